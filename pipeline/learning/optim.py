"""Optimizers, and learning-rate schedules as functions of the optimizer step."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import optim

from pipeline.config.schema import OptimConfig


def build_optimizer(
    config: OptimConfig, groups: Sequence[dict[str, Any]], *, capture_on: torch.device | None = None
) -> optim.Optimizer:
    """Return the optimizer in the fastest form that torch has: one kernel for all parameters, or one per operation.

    `groups` are torch's parameter groups; one without `lr` or `weight_decay` has those of the config. With `capture_on`
    a step can be captured there in a CUDA graph: learning rates are tensors on that device.
    """
    capturable, parameters = capture_on is not None, []
    for group in groups:
        initial: Any = group.get("lr", config.lr)
        lr = torch.tensor(initial, device=capture_on) if capturable else initial
        parameters.append({"weight_decay": config.weight_decay} | group | {"lr": lr, "initial_lr": initial})
    momentum, capture = {"momentum": config.momentum}, {"capturable": capturable}
    forms: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
        "sgd": (optim.SGD, {"fused": True, "nesterov": config.nesterov} | momentum),
        "adam": (optim.Adam, {"fused": True} | capture),
        "adamw": (optim.AdamW, {"fused": True} | capture),
        "rmsprop": (optim.RMSprop, {"foreach": True} | momentum | capture),
        "adadelta": (optim.Adadelta, {"foreach": True} | capture),
    }
    kind, options = forms[config.name]
    optimizer = without_compiler(kind)(parameters, **options)
    if config.name == "sgd" and config.momentum:
        # else made without values by the first step, and left so if loss scaling skips that
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in trained})
    return optimizer


def without_compiler(kind: type[optim.Optimizer]) -> type[optim.Optimizer]:
    """Return the same class of optimizer with methods that do not import torch's compiler first, which takes long.

    torch keeps the compiler from looking into these methods, so that compiling the model does not compile them anyway.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods | {"__module__": kind.__module__})


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at an optimizer step, counted from 0.

    A function without state: the curve depends on neither the number of ranks nor resumes, and a checkpoint has
    nothing of it to carry. All shapes rise linearly over `warmup` steps first, reaching 1 on the step after.
    """

    config: OptimConfig
    steps_per_epoch: int
    total_steps: int

    def factor(self, step: int) -> float:
        if self.config.schedule == "one_cycle":
            return self._one_cycle(step)
        warmup = self.config.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.config.schedule == "step":
            falls = (step - warmup) // (self.config.step_epochs * self.steps_per_epoch)
            return self.config.step_gamma**falls
        if self.config.schedule == "cosine":
            return _cosine(1.0, 0.0, (step - warmup) / max(1, self.total_steps - warmup))
        return 1.0

    def _one_cycle(self, step: int) -> float:
        """Rise from 1/25 to 1 over the warm-up, then fall to 1/25e4, both along a cosine.

        Smith & Topin 2018 (arXiv 1708.07120) with the constants of torch's OneCycleLR.
        """
        peak = self.config.warmup or max(1, round(0.3 * self.total_steps))
        if step < peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, (step - peak) / max(1, self.total_steps - 1 - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    """Return the value between `start` and `end` along half a cosine, at `progress` in 0..1 (held beyond)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

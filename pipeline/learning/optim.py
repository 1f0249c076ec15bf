"""Optimizers, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn, optim

from pipeline.config import OptimConfig

T = TypeVar("T", bound=optim.Optimizer)


def build_optimizer(
    config: OptimConfig, weights: Iterable[nn.Parameter], *, capture_on: torch.device | None = None
) -> optim.Optimizer:
    """In the fastest form that torch has: one kernel for all, or else one per operation for all parameters.

    With `capture_on` a step can be captured there in a CUDA graph: the learning rate is a tensor on that device.
    """
    parameters, decay, capturable = list(weights), config.weight_decay, capture_on is not None
    lr: Any = torch.tensor(config.lr, device=capture_on) if capturable else config.lr
    match config.name:
        case "sgd":
            sgd = without_compiler(optim.SGD)(
                parameters, lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=decay, fused=True
            )
            if config.momentum:
                # else made without values by the first step, and left so if loss scaling skips that
                sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters})
            return sgd
        case "adam" | "adamw":
            adam = without_compiler(optim.Adam if config.name == "adam" else optim.AdamW)
            return adam(parameters, lr, weight_decay=decay, fused=True, capturable=capturable)
        case "rmsprop":
            rmsprop = without_compiler(optim.RMSprop)
            return rmsprop(
                parameters, lr, momentum=config.momentum, weight_decay=decay, foreach=True, capturable=capturable
            )
        case "adadelta":
            adadelta = without_compiler(optim.Adadelta)
            return adadelta(parameters, lr, weight_decay=decay, foreach=True, capturable=capturable)


def without_compiler(kind: type[T]) -> type[T]:
    """The same optimizer, whose methods do not import torch's compiler first, which takes long.

    torch keeps the compiler from looking into these methods; who compiles the network does not compile them anyway.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods | {"__module__": kind.__module__})


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)  # in place: a captured step reads it from there
        else:
            group["lr"] = lr


@dataclass(frozen=True)
class Schedule:
    """Learning rate at a global optimizer step, counted from 0.

    A function without state: the curve depends on neither the number of ranks nor resumes, and a checkpoint has
    nothing of it to carry. All shapes rise linearly over `warmup` steps first, reaching `lr` on the step after.
    """

    config: OptimConfig
    steps_per_epoch: int
    total_steps: int

    def lr(self, step: int) -> float:
        return self.config.lr * self._factor(step)

    def _factor(self, step: int) -> float:
        if self.config.schedule == "one_cycle":
            return self._one_cycle(step)
        warmup = self.config.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        match self.config.schedule:
            case "step":
                falls = (step - warmup) // (self.config.step_epochs * self.steps_per_epoch)
                return self.config.step_gamma**falls
            case "cosine":
                return _cosine(1.0, 0.0, (step - warmup) / max(1, self.total_steps - warmup))
            case _:
                return 1.0

    def _one_cycle(self, step: int) -> float:
        """Smith & Topin 2018 (arXiv 1708.07120) with the constants of torch's OneCycleLR: from 1/25 up to 1 over
        the warm-up, then down to 1/25e4, both along a cosine."""
        peak = self.config.warmup or max(1, round(0.3 * self.total_steps))
        if step < peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, (step - peak) / max(1, self.total_steps - 1 - peak))


def _cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine; `progress` in 0..1 (held beyond)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

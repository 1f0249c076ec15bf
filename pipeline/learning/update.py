"""Number formats; and from summed gradients to new weights: unscale -> check -> clip -> step, here alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.learning.optim import Schedule, build_optimizer


class Precision:
    """Weights are float32 (float64 with fp64); bf16 and fp16 apply to what autocast lists."""

    def __init__(self, name: str, device: torch.device):
        """`name`: fp32, bf16, fp16 or fp64, as `choose_precision` returns it."""
        self.name = name
        self.weights_dtype = torch.float64 if name == "fp64" else torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._device_type = device.type

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        return nullcontext() if dtype is None else torch.autocast(self._device_type, dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled with fp16, to those of the parameters."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]


def choose_precision(name: str, device: torch.device) -> str:
    """Return `name`; for auto bf16 on GPUs that compute in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class NonFiniteError(Exception):
    """Gradients were not finite in too many steps in a row."""


class Update:
    """One optimizer step, the same for every way of executing a training step. It can be captured in a CUDA graph."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule, precision: Precision, clip_norm: float | None = None):
        """Each parameter group has its own `initial_lr`, which the schedule scales."""
        self.optimizer = optimizer
        self.schedule = schedule
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._precision = precision
        self._clip_norm = clip_norm
        self.lr = 0.0
        """The learning rate of the first parameter group in this step."""
        self.skipped = torch.zeros(3, dtype=torch.float64, device=self.parameters[0].device)
        """Steps skipped in all, in the current run of skipped steps, in the longest run since `pop_skipped`."""

    def set_step(self, step: int) -> None:
        """Set the learning rate of each parameter group from the schedule, for optimizer step `step` from 0 on."""
        self.scale_lr(self.schedule.factor(step))

    def scale_lr(self, factor: float) -> None:
        """Set the learning rate of each group to `factor` times its initial one."""
        for group in self.optimizer.param_groups:
            lr = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # in place: a captured step reads it from there
            else:
                group["lr"] = lr
        self.lr = self.optimizer.param_groups[0]["initial_lr"] * factor

    @torch.no_grad()
    def __call__(self) -> None:
        """Change the weights by their gradients, which are cleared; or only count, if those are not finite.

        The gradients are the same on every rank, so that all ranks decide the same without asking.
        """
        scaler = self._precision.scaler
        scaler.unscale_(self.optimizer)  # clipping scaled gradients would clip by a norm 65536 times too small
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        is_finite = norm.isfinite()
        total, current, longest = self.skipped.unbind()  # counted on the device, so that the host does not wait
        total += ~is_finite
        current += 1
        current *= ~is_finite
        torch.maximum(longest, current, out=longest)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self._clip_norm, norm)
        if scaler.is_enabled():
            scaler.step(self.optimizer)  # skips by itself
            scaler.update()
        else:
            _step_if(is_finite, self.optimizer, gradients)
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def num_skipped(self) -> int:
        """Return how many steps of the whole training were skipped; waits for the device."""
        return int(self.skipped[0])

    def pop_skipped(self) -> Tensor:
        """Return float64 [2] on the device: steps skipped in all, and the longest run of them since the last call."""
        taken = self.skipped[::2].clone()
        self.skipped[2] = self.skipped[1]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._precision.scaler.state_dict(),
            "skipped": float(self.num_skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint with the settings of now (say, another weight decay)."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if state["scaler"]:  # empty when the checkpoint was written without loss scaling
            self._precision.scaler.load_state_dict(state["scaler"])
        # the current run of skipped steps starts anew: what ended a training may have been mended
        self.skipped.copy_(torch.tensor([state["skipped"], 0.0, 0.0]))


def build_update(
    model: nn.Module, schedule: Schedule, precision: Precision, clip_norm: float | None, *, capture: bool
) -> Update:
    """Return the update of the model's weights. With `capture` it can be captured in a CUDA graph."""
    parameters = list(model.parameters())
    capture_on = parameters[0].device if capture else None
    optimizer = build_optimizer(schedule.config, [{"params": parameters}], capture_on=capture_on)
    return Update(optimizer, schedule, precision, clip_norm)


def _step_if(is_finite: Tensor, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Call `optimizer.step()` or not; where the host would have to wait for the device, the device decides."""
    on_device = is_finite.device.type != "cpu"
    if on_device and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif on_device and optimizer.defaults.get("capturable"):
        _step_without_effect_unless(is_finite, optimizer, gradients)
    elif is_finite:
        optimizer.step()


def _step_without_effect_unless(is_finite: Tensor, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Step with zero gradients at rate zero unless `is_finite`: for optimizers that cannot skip within a CUDA graph.

    The weights stay; the running averages age by a step.
    """
    for group in optimizer.param_groups:
        group["lr"].mul_(is_finite)
    for gradient in gradients:
        gradient.copy_(torch.where(is_finite, gradient, 0.0))
    optimizer.step()

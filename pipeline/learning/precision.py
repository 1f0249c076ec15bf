"""Autocast and loss scaling, and the one place where unscale -> check -> clip -> step is done in that order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class NonFiniteError(Exception):
    """Gradients were not finite in too many steps in a row."""


class Precision:
    """Weights are float32 (float64 with fp64); bf16 and fp16 apply to what autocast lists."""

    def __init__(self, name: str, device: torch.device):
        self.name = choose_precision(name, device)
        self.weights_dtype = torch.float64 if self.name == "fp64" else torch.float32
        self._device_type = device.type
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")
        self.skipped = torch.zeros(3, dtype=torch.float64, device=device)
        """Steps skipped so far, of these the last ones in a row, and the longest row since `take_skipped`."""

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name in ("fp32", "fp64"):
            return nullcontext()
        return torch.autocast(self._device_type, DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], clip_norm: float | None) -> None:
        """One optimizer step from the gradients, which are cleared; or none, and a count, if they are not finite.

        The gradients are the same on every rank, so that all ranks decide the same without asking.
        """
        self._scaler.unscale_(optimizer)  # clipping scaled gradients would clip by a norm 65536 times too small
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        is_finite = norm.isfinite()
        self._count(is_finite)
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)  # skips by itself
            self._scaler.update()
        else:
            _step_if(is_finite, optimizer, gradients)
        optimizer.zero_grad(set_to_none=True)

    def _count(self, is_finite: Tensor) -> None:
        """On the device: nobody waits for it."""
        skipped, in_row, longest = self.skipped.unbind()
        skipped += ~is_finite
        in_row += 1
        in_row *= ~is_finite
        torch.maximum(longest, in_row, out=longest)

    def take_skipped(self) -> Tensor:
        """float64 [2] on the device: steps skipped in all, and the longest row of them since the last call."""
        taken = self.skipped[::2].clone()
        self.skipped[2] = self.skipped[1]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict() | {"skipped": self.skipped.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scale = {key: value for key, value in state.items() if key != "skipped"}
        if scale:  # none when the checkpoint was written without loss scaling
            self._scaler.load_state_dict(scale)
        skipped = state.get("skipped", [0.0])[0]
        self.skipped.copy_(torch.tensor([skipped, 0.0, 0.0]))  # what ended a training may have been mended


def _step_if(is_finite: Tensor, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """`optimizer.step()`, or nothing; where the host would have to wait for the device, that decides by itself."""
    if is_finite.device.type == "cpu":
        if is_finite:
            optimizer.step()
    elif optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif optimizer.defaults.get("capturable"):
        _step_without_effect_unless(is_finite, optimizer, gradients)
    elif is_finite:
        optimizer.step()


def _step_without_effect_unless(is_finite: Tensor, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """For optimizers that know no skipping, in a CUDA graph: zero gradients at rate zero leave the weights alone.

    Their running averages age by a step.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for rate in rates:
        rate.mul_(is_finite)
    for gradient in gradients:
        gradient.copy_(torch.where(is_finite, gradient, 0.0))
    optimizer.step()


def choose_precision(name: str, device: torch.device) -> str:
    """auto -> fp32 on CPU, bf16 on GPUs that compute in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

"""Autocast and loss scaling, and the one place where unscale -> clip -> step -> update is done in that order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Precision:
    """Weights are float32 (float64 with fp64); bf16 and fp16 apply to what autocast lists."""

    def __init__(self, name: str, device: torch.device):
        self.name = choose_precision(name, device)
        self.weights_dtype = torch.float64 if self.name == "fp64" else torch.float32
        self._device_type = device.type
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name in ("fp32", "fp64"):
            return nullcontext()
        return torch.autocast(self._device_type, DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], clip_norm: float | None) -> None:
        """One optimizer step from the gradients, which are cleared."""
        if clip_norm is not None:
            # clipping scaled gradients would clip by a norm 65536 times too small
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        self._scaler.step(optimizer)  # skips the step if a gradient overflowed, on every rank alike
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # empty when the checkpoint was written without loss scaling
            self._scaler.load_state_dict(state)


def choose_precision(name: str, device: torch.device) -> str:
    """auto -> fp32 on CPU, bf16 on GPUs that compute in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

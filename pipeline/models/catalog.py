"""The register of networks: what each is called, what it takes and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from pipeline.models.networks import build_convnet, build_lenet, build_net_conv10_20


@dataclass(frozen=True)
class Network:
    build: Callable[..., nn.Module]
    output: Literal["log_probabilities", "scores"]
    min_image_size: int
    """Side in pixels under which no pixel is left for the linear layers."""
    arguments: tuple[str, ...] = ()


NETWORKS: Mapping[str, Network] = {
    "convnet": Network(build_convnet, "log_probabilities", 6, ("dropout", "dropout2d")),
    "lenet_3x3": Network(partial(build_lenet, kernel_size=3), "scores", 10),
    "lenet_5x5": Network(partial(build_lenet, kernel_size=5), "scores", 16),
    "net_conv10_20": Network(build_net_conv10_20, "log_probabilities", 16, ("dropout2d",)),
}


def build_model(
    name: str, channels: int, image_size: int, num_classes: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network for images [N, channels, image_size, image_size]; raises KeyError for an unknown name."""
    return NETWORKS[name].build(channels, image_size, num_classes, **(arguments or {}))


@dataclass(frozen=True)
class LayerRow:
    name: str
    kind: str
    output_shape: tuple[int, ...]
    """Without the batch dimension."""
    num_parameters: int


def describe_layers(model: nn.Module, channels: int, image_size: int) -> list[LayerRow]:
    """One row per layer that computes, in order of use, from a forward pass of one blank image."""
    rows: list[LayerRow] = []

    def record(name: str, layer: nn.Module, output: torch.Tensor) -> None:
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        rows.append(LayerRow(name, type(layer).__name__, tuple(output.shape[1:]), parameters))

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: record(name, layer, output))
        for name, layer in model.named_modules()
        if not any(layer.children())
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, image_size, image_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return rows

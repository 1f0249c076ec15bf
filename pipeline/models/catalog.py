"""The models by name, the description from which one can be built again, and what can be asked of any model."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.base.seeding import stream_seed
from pipeline.config.arguments import convert_arguments, resolve
from pipeline.config.schema import TrainConfig
from pipeline.models import networks

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "convnet": networks.convnet,
    "lenet_3x3": networks.lenet_3x3,
    "lenet_5x5": networks.lenet_5x5,
    "net_conv10_20": networks.net_conv10_20,
}
END_IN_LOG_SOFTMAX = ("convnet", "net_conv10_20")


def builder(name: str) -> Callable[..., nn.Module]:
    """Return the function (channels, image_size, num_classes, **arguments) that builds a model.

    `name` is one of MODELS, or "package.module:callable". Raises ValueError that says why there is no such function.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ValueError(f"{name} is no model; accepted: {', '.join(MODELS)}, or package.module:callable")
    return resolve(name)


@dataclass(frozen=True)
class ModelSpec:
    """All that it takes to build a model. `dataclasses.asdict` makes JSON of it, `ModelSpec(**...)` a spec of that."""

    name: str
    """One of MODELS, or "package.module:callable"."""
    arguments: Mapping[str, Any]
    """Those that were set; the builder's defaults hold for the others."""
    channels: int
    image_size: int
    """Side in pixels."""
    num_classes: int

    def build(self) -> nn.Module:
        """Return the model with initial weights from torch's generator.

        Raises ValueError for a name, arguments or sizes that do not fit.
        """
        build = builder(self.name)
        sizes = {"channels": self.channels, "image_size": self.image_size, "num_classes": self.num_classes}
        return build(**sizes, **convert_arguments(build, self.arguments, sizes))


def build_model(spec: ModelSpec, config: TrainConfig, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model to be trained, with the same initial weights on every rank, by the seed."""
    torch.manual_seed(stream_seed(seed, "weights"))
    model = spec.build().to(device, dtype)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    return model


def output_of(name: str) -> Literal["log_probabilities", "logits"] | None:
    """Return what a model gives for an image and a class; None for one that is not ours."""
    if name not in MODELS:
        return None
    return "log_probabilities" if name in END_IN_LOG_SOFTMAX else "logits"


def has_batch_statistics(model: nn.Module) -> bool:
    """Return whether padding a batch would change what the model computes for the other samples."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(layer, kinds) for layer in model.modules())


class LayerRow(NamedTuple):
    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch dimension
    num_parameters: int


def describe_layers(model: nn.Module, channels: int, image_size: int) -> list[LayerRow]:
    """Return one row per layer that computes, in order of use, from a forward pass of one blank image."""
    names = {layer: name for name, layer in model.named_modules() if not any(layer.children())}
    rows: list[LayerRow] = []

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        num_parameters = sum(parameter.numel() for parameter in layer.parameters())
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()  # a recurrent layer gives several
        rows.append(LayerRow(names[layer], type(layer).__name__, shape, num_parameters))

    with torch.no_grad(), ExitStack() as stack:
        stack.callback(model.train, model.training)
        for layer in names:
            stack.enter_context(layer.register_forward_hook(record))
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    return rows

"""The networks: layer by layer as specified, for any number of channels, any size and any number of classes."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.catalog import MODELS, ModelSpec, builder, describe_layers, has_batch_statistics, output_of
from pipeline.parallel.rank import Rank
from tests.ranks import run_ranks

Row = tuple[str, str, tuple[int, ...], int]

# name, kind, output shape, parameters: a convolution has in * out * k * k + out, a linear layer in * out + out
CONVNET_28: list[Row] = [
    ("conv1", "Conv2d", (16, 26, 26), 1 * 16 * 3 * 3 + 16),
    ("relu1", "ReLU", (16, 26, 26), 0),
    ("conv2", "Conv2d", (32, 24, 24), 16 * 32 * 3 * 3 + 32),
    ("pool", "MaxPool2d", (32, 12, 12), 0),
    ("relu2", "ReLU", (32, 12, 12), 0),
    ("dropout2d", "Dropout2d", (32, 12, 12), 0),
    ("flatten", "Flatten", (4608,), 0),
    ("fc1", "Linear", (64,), 4608 * 64 + 64),
    ("relu3", "ReLU", (64,), 0),
    ("dropout", "Dropout", (64,), 0),
    ("fc2", "Linear", (10,), 64 * 10 + 10),
    ("log_softmax", "LogSoftmax", (10,), 0),
]
LENET_3X3_32: list[Row] = [
    ("conv1", "Conv2d", (6, 30, 30), 1 * 6 * 3 * 3 + 6),
    ("pool1", "MaxPool2d", (6, 15, 15), 0),
    ("relu1", "ReLU", (6, 15, 15), 0),
    ("conv2", "Conv2d", (16, 13, 13), 6 * 16 * 3 * 3 + 16),
    ("pool2", "MaxPool2d", (16, 6, 6), 0),
    ("relu2", "ReLU", (16, 6, 6), 0),
    ("flatten", "Flatten", (576,), 0),
    ("fc1", "Linear", (120,), 576 * 120 + 120),
    ("relu3", "ReLU", (120,), 0),
    ("fc2", "Linear", (84,), 120 * 84 + 84),
    ("relu4", "ReLU", (84,), 0),
    ("fc3", "Linear", (10,), 84 * 10 + 10),
]
LENET_5X5_32: list[Row] = [
    ("conv1", "Conv2d", (6, 28, 28), 1 * 6 * 5 * 5 + 6),
    ("pool1", "MaxPool2d", (6, 14, 14), 0),
    ("relu1", "ReLU", (6, 14, 14), 0),
    ("conv2", "Conv2d", (16, 10, 10), 6 * 16 * 5 * 5 + 16),
    ("pool2", "MaxPool2d", (16, 5, 5), 0),
    ("relu2", "ReLU", (16, 5, 5), 0),
    ("flatten", "Flatten", (400,), 0),
    ("fc1", "Linear", (120,), 400 * 120 + 120),
    ("relu3", "ReLU", (120,), 0),
    ("fc2", "Linear", (84,), 120 * 84 + 84),
    ("relu4", "ReLU", (84,), 0),
    ("fc3", "Linear", (10,), 84 * 10 + 10),
]
NET_CONV10_20_28: list[Row] = [
    ("conv1", "Conv2d", (10, 24, 24), 1 * 10 * 5 * 5 + 10),
    ("pool1", "MaxPool2d", (10, 12, 12), 0),
    ("relu1", "ReLU", (10, 12, 12), 0),
    ("conv2", "Conv2d", (20, 8, 8), 10 * 20 * 5 * 5 + 20),
    ("pool2", "MaxPool2d", (20, 4, 4), 0),
    ("relu2", "ReLU", (20, 4, 4), 0),
    ("dropout2d", "Dropout2d", (20, 4, 4), 0),
    ("flatten", "Flatten", (320,), 0),
    ("fc1", "Linear", (100,), 320 * 100 + 100),
    ("fc2", "Linear", (10,), 100 * 10 + 10),
    ("log_softmax", "LogSoftmax", (10,), 0),
]


SMALLEST = {"convnet": 6, "lenet_3x3": 10, "lenet_5x5": 16, "net_conv10_20": 16}
"""Side in pixels."""


def build_model(
    name: str, channels: int, image_size: int, num_classes: int, arguments: dict[str, Any] | None = None
) -> nn.Module:
    return ModelSpec(name, arguments or {}, channels, image_size, num_classes).build()


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "image_size", "layers", "total"),
    [
        ("convnet", 28, CONVNET_28, 300_426),
        ("lenet_3x3", 32, LENET_3X3_32, 81_194),
        ("lenet_5x5", 32, LENET_5X5_32, 61_706),
        ("net_conv10_20", 28, NET_CONV10_20_28, 38_390),
    ],
)
def test_the_layers_are_as_specified(name: str, image_size: int, layers: list[Row], total: int) -> None:
    model = build_model(name, 1, image_size, 10)
    rows = describe_layers(model, 1, image_size)
    assert [(row.name, row.kind, row.output_shape, row.num_parameters) for row in rows] == layers
    assert num_parameters(model) == total == sum(row[3] for row in layers)


@pytest.mark.parametrize(
    ("name", "channels", "image_size", "num_classes", "total"),
    [
        # of 32x32: 14x14 after the pool
        ("convnet", 3, 32, 10, (3 * 16 * 9 + 16) + 4640 + (32 * 14 * 14 * 64 + 64) + 650),
        ("lenet_3x3", 3, 32, 10, (3 * 6 * 9 + 6) + 880 + 69_240 + 10_164 + 850),
        ("lenet_5x5", 3, 32, 10, (3 * 6 * 25 + 6) + 2416 + 48_120 + 10_164 + 850),
        # of 32x32: 14x14 after the first pool, 5x5 after the second
        ("net_conv10_20", 3, 32, 10, (3 * 10 * 25 + 10) + 5020 + (20 * 5 * 5 * 100 + 100) + 1010),
        ("convnet", 1, 28, 47, 160 + 4640 + 294_976 + (64 * 47 + 47)),
        ("lenet_3x3", 1, 32, 100, 60 + 880 + 69_240 + 10_164 + 8500),
        # of 28x28: 12x12, then 4x4
        ("lenet_5x5", 1, 28, 2, 156 + 2416 + (16 * 4 * 4 * 120 + 120) + 10_164 + 170),
        ("net_conv10_20", 2, 28, 3, (2 * 10 * 25 + 10) + 5020 + 32_100 + 303),
    ],
)
def test_channels_size_and_classes_follow_from_the_dataset(
    name: str, channels: int, image_size: int, num_classes: int, total: int
) -> None:
    model = build_model(name, channels, image_size, num_classes)
    assert num_parameters(model) == total
    with torch.no_grad():
        assert model(torch.rand(5, channels, image_size, image_size)).shape == (5, num_classes)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_what_the_catalog_says(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 1, 32, 10).double().eval()
    with torch.no_grad():
        output = model(torch.randn(20, 1, 32, 32, dtype=torch.float64))
    are_log_probabilities = torch.allclose(output.exp().sum(1), torch.ones(20).double(), rtol=0, atol=1e-12)
    assert output_of(name) == ("log_probabilities" if are_log_probabilities else "logits")
    assert are_log_probabilities == (name in ("convnet", "net_conv10_20"))


def test_nothing_is_said_of_the_output_of_a_model_that_is_not_ours() -> None:
    assert output_of("torch.nn:Identity") is None


@pytest.mark.parametrize("name", MODELS)
def test_every_size_from_the_smallest_on_works(name: str) -> None:
    for image_size in range(SMALLEST[name], SMALLEST[name] + 9):
        with torch.no_grad():
            output = build_model(name, 2, image_size, 3)(torch.rand(2, 2, image_size, image_size))
        assert output.shape == (2, 3)


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_size_is_refused_with_the_smallest(name: str) -> None:
    too_small = SMALLEST[name] - 1
    message = f"images of {too_small} pixels are too small; accepted: {SMALLEST[name]} and more"
    with pytest.raises(ValueError, match=message):
        build_model(name, 1, too_small, 3)


def dropouts(model: nn.Module) -> dict[str, float]:
    return {name: layer.p for name, layer in model.named_modules() if isinstance(layer, nn.Dropout | nn.Dropout2d)}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("convnet", {}, {"dropout": 0.25, "dropout2d": 0.10}),
        ("convnet", {"dropout": 0.5}, {"dropout": 0.5, "dropout2d": 0.10}),
        ("convnet", {"dropout2d": 0.0}, {"dropout": 0.25, "dropout2d": 0.0}),
        ("net_conv10_20", {}, {"dropout2d": 0.25}),
        ("net_conv10_20", {"dropout2d": 0.4}, {"dropout2d": 0.4}),
        ("lenet_3x3", {}, {}),
        ("lenet_5x5", {}, {}),
    ],
)
def test_dropout_is_as_specified_or_as_set(name: str, arguments: dict[str, Any], expected: dict[str, float]) -> None:
    assert dropouts(build_model(name, 1, 32, 10, arguments)) == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("argument", ["dropout", "dropout2d"])
def test_a_model_takes_the_arguments_of_its_builder_and_no_others(name: str, argument: str) -> None:
    if argument in inspect.signature(builder(name)).parameters:
        assert dropouts(build_model(name, 1, 32, 10, {argument: "0.125"}))[argument] == 0.125
        for wrong in ("1", "-0.1", "much"):
            with pytest.raises(ValueError, match=rf"{argument} = {wrong}: accepted: .*>= 0 and < 1"):
                build_model(name, 1, 32, 10, {argument: wrong})
    else:
        with pytest.raises(ValueError, match=f"{argument} = 0.125: unknown"):
            build_model(name, 1, 32, 10, {argument: 0.125})


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"alexnet is no model; accepted: convnet, lenet_3x3, .*package.module:call"):
        build_model("alexnet", 1, 32, 10)
    with pytest.raises(ValueError, match=r"torch\.nn:Alexnet cannot be imported"):
        build_model("torch.nn:Alexnet", 1, 32, 10)


def perceptron(channels: int, image_size: int, num_classes: int, *, width: int = 8) -> nn.Module:
    inputs = channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Linear(width, num_classes))


def test_a_function_that_can_be_imported_builds_a_model_of_ones_own() -> None:
    model = build_model(f"{__name__}:perceptron", 3, 4, 5, {"width": "16"})
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 5)
    assert num_parameters(model) == 48 * 16 + 16 + 2 * 16 + 16 * 5 + 5


def test_batch_statistics_are_found() -> None:
    assert has_batch_statistics(build_model(f"{__name__}:perceptron", 1, 4, 5))
    assert not any(has_batch_statistics(build_model(name, 1, 32, 10)) for name in MODELS)


WEIGHTS = {
    "convnet": "5bbd03859008fae7bd4b4ed470bec80378a76d2d30d1ac617bd9a1650c4ca6d3",
    "lenet_3x3": "427706e18bbd1b07ac8cb24701f9df28f16f7b751dcb81e7c7113108402fa61f",
    "lenet_5x5": "45d9ef0a7e220a1aa21069f510fdf22e2ddfcdfe8c42b390835817ce43cd99e2",
    "net_conv10_20": "d6aecd084bc10e813c6935f3dfb0d3a09ea6a0db914e6a1f85a2d75f5c8a87a0",
}
"""SHA-256 of names and initial weights for images of 1x28x28, 10 classes and seed 0."""


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_weights_it_always_gave(name: str) -> None:
    """Weights drawn otherwise would make every recorded history another one."""
    torch.manual_seed(0)
    digest = hashlib.sha256()
    for key, value in build_model(name, 1, 28, 10).state_dict().items():
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS[name]


@pytest.mark.parametrize("training", [True, False])
def test_describing_leaves_the_network_as_it_was(training: bool) -> None:
    model = build_model("convnet", 1, 28, 10).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = describe_layers(model, 1, 28)
    assert [module.training for module in model.modules()] == [training] * 13
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert describe_layers(model, 1, 28) == first  # no hook of the first time is left
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "tutorial"),
    [
        ("convnet", "conv1 relu1 conv2 relu2 pool dropout2d flatten fc1 relu3 dropout fc2 log_softmax"),
        ("lenet_5x5", "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2 relu4 fc3"),
        ("lenet_3x3", "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2 relu4 fc3"),
    ],
)
def test_the_order_of_pool_and_relu_changes_neither_values_nor_gradients(name: str, tutorial: str) -> None:
    ours, theirs = run_ranks(1, _outputs_and_gradients, name, tutorial.split())[0]
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def _outputs_and_gradients(rank: Rank, name: str, tutorial: list[str]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    model = build_model(name, 1, 32, 10).eval()
    layers = dict(model.named_children())
    assert set(layers) == set(tutorial)
    as_in_tutorial = nn.Sequential(*(layers[layer] for layer in tutorial))
    images = torch.randn(8, 1, 32, 32)
    results = []
    for network in (model, as_in_tutorial):
        output = network(images)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    return results


def test_a_layer_with_several_outputs_is_described_without_a_shape() -> None:
    model = nn.Sequential(nn.Flatten(2), nn.LSTM(4, 3))
    rows = describe_layers(model, 5, 2)
    assert [(row.kind, row.output_shape) for row in rows] == [("Flatten", (5, 4)), ("LSTM", ())]

"""The networks: layer by layer as specified, for any number of channels, any size and any number of classes."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from pipeline.config import FIELDS
from pipeline.models.catalog import NETWORKS, build_model, describe_layers

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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_what_the_register_promises(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 1, 32, 10).double().eval()
    with torch.no_grad():
        output = model(torch.randn(20, 1, 32, 32, dtype=torch.float64))
    are_log_probabilities = torch.allclose(output.exp().sum(1), torch.ones(20).double(), rtol=0, atol=1e-12)
    assert are_log_probabilities == (NETWORKS[name].output == "log_probabilities")


def test_the_networks_that_give_log_probabilities_are_the_two_that_end_in_a_log_softmax() -> None:
    assert {name for name, n in NETWORKS.items() if n.output == "log_probabilities"} == {"convnet", "net_conv10_20"}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_size_from_the_smallest_on_works(name: str) -> None:
    smallest = NETWORKS[name].min_image_size
    for image_size in range(smallest, smallest + 9):
        with torch.no_grad():
            output = build_model(name, 2, image_size, 3)(torch.rand(2, 2, image_size, image_size))
        assert output.shape == (2, 3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", NETWORKS)
def test_no_size_under_the_smallest_works(name: str) -> None:
    too_small = NETWORKS[name].min_image_size - 1

    def use() -> None:
        build_model(name, 1, too_small, 3)(torch.rand(2, 1, too_small, too_small))

    with pytest.raises(RuntimeError, match=r"too small|zero|negative|greater than"):
        use()


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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("argument", ["dropout", "dropout2d"])
def test_a_network_takes_the_arguments_that_the_register_lists_and_no_others(name: str, argument: str) -> None:
    if argument in NETWORKS[name].arguments:
        assert dropouts(build_model(name, 1, 32, 10, {argument: 0.125}))[argument] == 0.125
    else:
        with pytest.raises(TypeError, match=argument):
            build_model(name, 1, 32, 10, {argument: 0.125})


def test_the_register_holds_the_networks_that_the_config_offers() -> None:
    assert set(NETWORKS) == set(get_args(FIELDS["model.name"].annotation))


def test_an_unknown_network_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="alexnet"):
        build_model("alexnet", 1, 32, 10)


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
    torch.manual_seed(0)
    model = build_model(name, 1, 32, 10).eval()
    layers = dict(model.named_children())
    assert set(layers) == set(tutorial.split())
    as_in_tutorial = nn.Sequential(*(layers[layer] for layer in tutorial.split()))
    images = torch.randn(8, 1, 32, 32)
    results = []
    for network in (model, as_in_tutorial):
        output = network(images)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))

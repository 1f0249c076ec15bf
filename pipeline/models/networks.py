"""The networks of the tutorials this project grew from, as plain sequences of named layers.

Each builder takes the channels, the side in pixels and the classes of the dataset. It raises ValueError where no pixel
would be left for the linear layers. Where a tutorial has a ReLU and then a pool, the pool comes first here: values and
gradients are the same, since the largest of four stays the largest, for a quarter of the ReLU's work.
"""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge, Lt
from torch import nn

Dropout = Annotated[float, Ge(0), Lt(1)]
"""Probability of an element, or a channel, to be dropped."""


def convnet(
    channels: int, image_size: int, num_classes: int, *, dropout: Dropout = 0.25, dropout2d: Dropout = 0.10
) -> nn.Sequential:
    """Return two 3x3 convolutions and one pool; [N, channels, S, S] -> log-probabilities [N, num_classes].

    300,426 parameters for MNIST's 28x28. The tutorial drops whole "channels" of the 2-D hidden layer with Dropout2d,
    which is deprecated for that shape and the same as elementwise dropout.
    """
    _check_size(image_size, smallest=6)
    side = (image_size - 4) // 2
    return _sequence(
        conv1=nn.Conv2d(channels, 16, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3),
        pool=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        dropout2d=nn.Dropout2d(dropout2d),
        flatten=nn.Flatten(),
        fc1=nn.Linear(32 * side * side, 64),
        relu3=nn.ReLU(),
        dropout=nn.Dropout(dropout),
        fc2=nn.Linear(64, num_classes),
        log_softmax=nn.LogSoftmax(dim=1),
    )


def lenet_3x3(channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Return LeNet with ReLU and 3x3 convolutions; [N, channels, S, S] -> logits [N, num_classes]."""
    _check_size(image_size, smallest=10)
    return _lenet(channels, image_size, num_classes, kernel_size=3)


def lenet_5x5(channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Return LeNet with ReLU and 5x5 convolutions; [N, channels, S, S] -> logits [N, num_classes]."""
    _check_size(image_size, smallest=16)
    return _lenet(channels, image_size, num_classes, kernel_size=5)


def _lenet(channels: int, image_size: int, num_classes: int, *, kernel_size: int) -> nn.Sequential:
    side = ((image_size - kernel_size + 1) // 2 - kernel_size + 1) // 2
    return _sequence(
        conv1=nn.Conv2d(channels, 6, kernel_size),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 16, kernel_size),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * side * side, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        fc3=nn.Linear(84, num_classes),
    )


def net_conv10_20(channels: int, image_size: int, num_classes: int, *, dropout2d: Dropout = 0.25) -> nn.Sequential:
    """Return two 5x5 convolutions, pooled before the ReLU; [N, channels, S, S] -> log-probabilities [N, num_classes].

    The two linear layers have no activation between them, as in the tutorial.
    """
    _check_size(image_size, smallest=16)
    side = ((image_size - 4) // 2 - 4) // 2
    return _sequence(
        conv1=nn.Conv2d(channels, 10, 5),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(10, 20, 5),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        dropout2d=nn.Dropout2d(dropout2d),
        flatten=nn.Flatten(),
        fc1=nn.Linear(20 * side * side, 100),
        fc2=nn.Linear(100, num_classes),
        log_softmax=nn.LogSoftmax(dim=1),
    )


def _sequence(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _check_size(image_size: int, smallest: int) -> None:
    if image_size < smallest:
        raise ValueError(f"images of {image_size} pixels are too small; accepted: {smallest} and more")

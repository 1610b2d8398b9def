"""The paper's networks: kernels only, no biases, and batch normalization without gain and shift."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def vgg(stages: Sequence[tuple[int, int]], classes: int) -> nn.Sequential:
    """Convolutions, each followed by ReLU and then by its normalization, pooled between stages; one output layer.

    Args:
        stages: number of convolutions and of channels, stage by stage.
        classes: number of outputs.

    """
    net, channels = nn.Sequential(), 3
    for number, (depth, width) in enumerate(stages):
        if number:
            net.add_module(f"pool{number}", nn.MaxPool2d(2))
        for layer in range(depth):
            name = f"{number}_{layer}"
            net.add_module(f"conv{name}", _conv(channels, width))
            net.add_module(f"relu{name}", nn.ReLU())
            net.add_module(f"norm{name}", _norm(width))
            channels = width
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("output", nn.Linear(channels, classes, bias=False))
    return initialize(net, "he_uniform")


def torch_blog_vgg(classes: int) -> nn.Sequential:
    """The VGG of the torch blog for 32×32 images: normalization before ReLU, a hidden layer of 512, no dropout."""
    net, channels = nn.Sequential(), 3
    for number, (depth, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        for layer in range(depth):
            name = f"{number}_{layer}"
            net.add_module(f"conv{name}", _conv(channels, width))
            net.add_module(f"norm{name}", _norm(width))
            net.add_module(f"relu{name}", nn.ReLU())
            channels = width
        net.add_module(f"pool{number}", nn.MaxPool2d(2))
    net.add_module("flat", nn.Flatten())
    net.add_module("hidden", nn.Linear(channels, 512, bias=False))
    net.add_module("norm", nn.BatchNorm1d(512, eps=1e-3, affine=False))
    net.add_module("relu", nn.ReLU())
    net.add_module("output", nn.Linear(512, classes, bias=False))
    return initialize(net, "he_normal")


def six_convolutions(classes: int) -> nn.Sequential:
    """The network of the authors' example: 64, 64, 128, 128, 256, 256 channels, every second convolution unpadded."""
    net, channels = nn.Sequential(), 3
    for layer, width in enumerate([64, 64, 128, 128, 256, 256]):
        net.add_module(f"conv{layer}", _conv(channels, width, padding=1 - layer % 2))
        net.add_module(f"norm{layer}", _norm(width))
        net.add_module(f"relu{layer}", nn.ReLU())
        if layer in (1, 3):
            net.add_module(f"pool{layer}", nn.MaxPool2d(2))
        channels = width
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("output", nn.Linear(channels, classes, bias=False))
    return initialize(net, "glorot_uniform")


def perceptron() -> nn.Sequential:
    """784 - 784 - 10 with batch normalization behind the hidden layer."""
    net = nn.Sequential()
    net.add_module("flat", nn.Flatten())
    net.add_module("hidden", nn.Linear(784, 784, bias=False))
    net.add_module("norm", nn.BatchNorm1d(784, eps=1e-3, affine=False))
    net.add_module("relu", nn.ReLU())
    net.add_module("output", nn.Linear(784, 10, bias=False))
    return initialize(net, "glorot_uniform")


def resnet(depth: int, classes: int) -> nn.Sequential:
    """ResNet for 32×32 images: three stages of 16, 32, 64 channels with (depth - 2) / 6 blocks each."""
    net = nn.Sequential()
    net.add_module("stem", _conv(3, 16))
    net.add_module("norm", _norm(16))
    net.add_module("relu", nn.ReLU())
    channels = 16
    for stage, width in enumerate([16, 32, 64]):
        for block in range((depth - 2) // 6):
            stride = 2 if stage and not block else 1
            net.add_module(f"block{stage}_{block}", _ResNetBlock(channels, width, stride))
            channels = width
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("output", nn.Linear(channels, classes, bias=False))
    return initialize(net, "he_normal")


def wide_resnet(depth: int, widening: int, dropout: float, classes: int) -> nn.Sequential:
    """Wide ResNet for 32×32 images, normalization and ReLU before each convolution, (depth - 4) / 6 blocks a stage."""
    net, channels = nn.Sequential(), 16
    net.add_module("stem", _conv(3, channels))
    for stage, width in enumerate([16 * widening, 32 * widening, 64 * widening]):
        for block in range((depth - 4) // 6):
            stride = 2 if stage and not block else 1
            net.add_module(f"block{stage}_{block}", _WideBlock(channels, width, stride, dropout))
            channels = width
    net.add_module("norm", _norm(channels))
    net.add_module("relu", nn.ReLU())
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("output", nn.Linear(channels, classes, bias=False))
    return initialize(net, "glorot_uniform")


def initialize(net: nn.Sequential, how: str) -> nn.Sequential:
    """Draw every kernel as Keras does; he_normal is cut at two standard deviations there."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if how == "he_uniform":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            elif how == "he_normal":
                spread = (2 / module.weight[0].numel()) ** 0.5
                nn.init.trunc_normal_(module.weight, std=spread, a=-2 * spread, b=2 * spread)
            else:
                nn.init.xavier_uniform_(module.weight)
    return net


def set_norm_momentum(net: nn.Module, momentum: float) -> None:
    """How far one batch moves the running statistics of every normalization; Keras says 0.01 (its "0.99")."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = momentum


class _ResNetBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, width, stride=stride), _norm(width)
        self.conv2, self.norm2 = _conv(width, width), _norm(width)
        # In the paper's code this shortcut has no normalization.
        self.shortcut = nn.Identity() if channels == width else _conv(channels, width, size=1, padding=0, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return torch.relu(self.shortcut(x) + y)


class _WideBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), _conv(channels, width, stride=stride)
        self.norm2, self.conv2 = _norm(width), _conv(width, width)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if channels == width else _conv(channels, width, size=1, padding=0, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x).relu())
        y = self.conv2(self.dropout(self.norm2(y).relu()))
        return self.shortcut(x) + y


def _conv(channels: int, width: int, *, size: int = 3, padding: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, padding=padding, stride=stride, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, affine=False)

"""Convolutional models: the block structures of ResNet, ResNeXt, MobileNetV2 and U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_entry import DEPTHWISE, HEAD, STEM, Entry, Inputs


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with in-place ReLU and an in-place residual sum, as in torchvision."""

    def __init__(self, before: int, width: int, after: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or before != after:
            shortcut = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(
            Bottleneck(16, 16, 32, groups=groups), Bottleneck(32, 16, 32, groups=groups)
        )
        self.layer2 = nn.Sequential(Bottleneck(32, 32, 64, stride=2, groups=groups))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        hidden = 4 * before
        self.residual = stride == 1 and before == after
        self.conv = nn.Sequential(
            nn.Conv2d(before, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            InvertedResidual(8, 8, stride=1),
            InvertedResidual(8, 16, stride=2),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


class UNet(nn.Module):
    """Two levels, a transposed convolution on the way up and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.inner(x))
        up = self.up(F.relu(self.down(skip)))
        return self.out(torch.cat([up, skip], 1))


class ConvFamily(nn.Module):
    """Every rank of (transposed) convolution, groups, padding modes, and an output size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 16, 3, padding=1, padding_mode="circular")
        self.narrow = nn.Conv1d(16, 16, 1, groups=8)
        self.up1 = nn.ConvTranspose1d(16, 8, 3, stride=2, groups=2)
        self.conv2 = nn.Conv2d(8, 8, (3, 1), padding="same", groups=2)
        self.up2 = nn.ConvTranspose2d(8, 8, 3, stride=2, groups=4)
        self.conv3 = nn.Conv3d(8, 8, 3, padding=1)
        self.up3 = nn.ConvTranspose3d(8, 4, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.conv1(x))
        x = self.up1(x, output_size=(x.shape[-1] * 2 + 2,))
        x = self.conv2(x.unflatten(-1, (3, -1)))
        x = self.up2(x)
        return self.up3(self.conv3(x.unsqueeze(2)))


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def resnet50() -> tuple[nn.Module, Inputs]:
    return ResNet(), (image(),)


def resnet50_channels_last() -> tuple[nn.Module, Inputs]:
    model = ResNet().to(memory_format=torch.channels_last)
    return model, (image().to(memory_format=torch.channels_last),)


def resnext50() -> tuple[nn.Module, Inputs]:
    return ResNet(groups=4), (image(),)


def mobilenet() -> tuple[nn.Module, Inputs]:
    return MobileNetV2(), (image(),)


def unet() -> tuple[nn.Module, Inputs]:
    return UNet(), (image(),)


def conv_family() -> tuple[nn.Module, Inputs]:
    return ConvFamily(), (torch.randn(2, 8, 5),)


RESNET_SKIPPED = {"conv1.weight": STEM, "fc.weight": HEAD}

VISION_MODELS = {
    "resnet50": Entry(resnet50, RESNET_SKIPPED),
    "resnet50_channels_last": Entry(resnet50_channels_last, RESNET_SKIPPED),
    "resnext50": Entry(resnext50, RESNET_SKIPPED),
    "mobilenet_v2": Entry(
        mobilenet,
        {
            "features.0.weight": STEM,
            "features.3.conv.3.weight": DEPTHWISE,
            "features.4.conv.3.weight": DEPTHWISE,
            "classifier.1.weight": HEAD,
        },
    ),
    "unet": Entry(unet, {"inner.weight": STEM}),
    # narrow and up2 have two input channels per group.
    "conv_family": Entry(
        conv_family,
        {"narrow.weight": "not a multiple of 4", "up2.weight": "not a multiple of 4"},
    ),
}

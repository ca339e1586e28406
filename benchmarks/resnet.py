"""ResNet-50 in plain torch (torchvision does not install beside every torch), random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (blocks, inner channels, stride of the first block) of the four stages.
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a shortcut that is projected where shapes differ."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, inner, 1, 1)
        self.conv2, self.bn2 = _conv_bn(inner, inner, 3, stride)
        self.conv3, self.bn3 = _conv_bn(inner, 4 * inner, 1, 1)
        same = stride == 1 and channels == 4 * inner
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv_bn(channels, 4 * inner, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class ResNet50(nn.Module):
    """224x224 images to 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for count, inner, first_stride in STAGES:
            for number in range(count):
                blocks.append(Bottleneck(channels, inner, 1 if number else first_stride))
                channels = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.blocks(x).mean((2, 3)))


def _conv_bn(channels: int, out: int, size: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(out)


def fuse(model: ResNet50) -> ResNet50:
    """Folds each batch norm into the convolution before it, in place; for eval mode."""
    model.conv1, model.bn1 = fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    for block in model.blocks:
        for number in "123":
            conv, bn = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
            setattr(block, f"conv{number}", fuse_conv_bn_eval(conv, bn))
            setattr(block, f"bn{number}", nn.Identity())
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = nn.Sequential(fuse_conv_bn_eval(*block.shortcut))
    return model


def conv_layers() -> dict[str, tuple[nn.Conv2d, int]]:
    """The distinct convolutions of ResNet-50 without the stem: text -> (layer, input side)."""
    found: dict[str, tuple[nn.Conv2d, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        side = inputs[0].shape[-1]
        size, stride = module.kernel_size[0], module.stride[0]
        text = f"{module.in_channels}->{module.out_channels} {size}x{size}/{stride} @{side}"
        if module.in_channels > 3:
            found.setdefault(text, (module, side))

    model = ResNet50().eval()
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    return found

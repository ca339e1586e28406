"""Every torchvision model: classification, video, segmentation, detection, optical flow.

Nothing is downloaded (no weights, no backbone weights). Classifiers get the smallest square image
that they run on; detectors resize to 96 pixels and keep detections of any score, or there would be
nothing to compare. The two models of 600 million parameters have an eighth of their width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sweep.case import Case, Inputs, call, finite, liven, outputs

SIZES = (64, 96, 128, 224)
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d")
DETECTION = ("rcnn", "retinanet", "fcos", "ssd")


def names() -> list[str]:
    """Every registered model."""
    from torchvision import models

    return list(models.list_models())


def build(name: str, recipe: str = "") -> Case:
    """A model of torchvision and inputs; raises if none of the sizes runs."""
    tried: list[str] = []
    for label, make, inputs, train_inputs in _ways(name):
        if recipe and label != recipe:
            continue
        torch.manual_seed(0)
        try:
            model = make().eval()
            given = inputs()
            liven(model)
            with torch.no_grad():
                if not finite(outputs(call(model, given))):
                    raise ValueError("the output is not finite, or zero")
        except Exception as error:  # noqa: BLE001 (the next size may do)
            tried.append(f"{label}: {type(error).__name__}: {error}"[:150])
            continue
        return Case(model, inputs(), train_inputs() if train_inputs else None, label)
    raise ValueError("; ".join(tried))


Way = tuple[str, Callable[[], nn.Module], Callable[[], Inputs], Callable[[], Inputs] | None]


def _ways(name: str) -> list[Way]:
    if any(part in name for part in DETECTION):
        return [_detector(name)]
    if name.startswith("raft"):
        return [(_label(128), lambda: _get(name), _flow, None)]
    if name.startswith(VIDEO):
        ways = [
            _sized(name, size, (2, 3, frames, size, size))
            for frames in (8, 16)
            for size in (64, 224)
        ]
    else:
        ways = [_sized(name, size, (2, 3, size, size)) for size in SIZES]
    return ways


def _label(size: int) -> str:
    return f"{size} pixels"


def _sized(name: str, size: int, shape: tuple[int, ...]) -> Way:
    options = {"image_size": size} if name.startswith("vit_") else {}
    if name.startswith("maxvit"):
        options = {"input_size": (size, size)}
    return (
        "x".join(map(str, shape)),
        lambda: _get(name, **options),
        lambda: (_random(*shape),),
        None,
    )


def _get(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    fields: dict[str, Any] = {"weights": None, **options}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        fields |= {"weights_backbone": None, "num_classes": 5}
    with ExitStack() as stack:
        if name in ("regnet_y_128gf", "vit_h_14"):
            _thinner(stack)
        return models.get_model(name, **fields)


def _thinner(stack: ExitStack) -> None:
    from torchvision.models import regnet, vision_transformer

    transformer, plain = vision_transformer._vision_transformer, regnet._regnet

    def thin_transformer(**fields: Any) -> nn.Module:
        fields |= {"hidden_dim": fields["hidden_dim"] // 8, "mlp_dim": fields["mlp_dim"] // 8}
        return transformer(**fields)

    def thin_regnet(params: Any, *args: Any, **fields: Any) -> nn.Module:
        params.widths = [width // 8 for width in params.widths]
        params.group_widths = [width // 8 for width in params.group_widths]
        return plain(params, *args, **fields)

    stack.enter_context(
        mock.patch.object(vision_transformer, "_vision_transformer", thin_transformer)
    )
    stack.enter_context(mock.patch.object(regnet, "_regnet", thin_regnet))


def _detector(name: str) -> Way:
    fields: dict[str, Any] = {"weights_backbone": None, "num_classes": 5}
    if name.startswith("ssd"):
        fields |= {"score_thresh": 0.0, "detections_per_img": 8}
    else:
        fields |= {"min_size": 96, "max_size": 128}
        few = {"score_thresh": 0.0, "detections_per_img": 8}
        rcnn = {"box_score_thresh": 0.0, "box_detections_per_img": 8}
        fields |= rcnn if "rcnn" in name else few
    return "2 images of 96 pixels", lambda: _get(name, **fields), _images, lambda: _targets(name)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _images() -> Inputs:
    return (list(_random(2, 3, 96, 96).sigmoid()),)


def _targets(name: str) -> Inputs:
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [30.0, 20.0, 90.0, 88.0]])
    target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    if name.startswith("mask"):
        target["masks"] = (_random(2, 96, 96) > 0).to(torch.uint8)
    if name.startswith("keypoint"):
        places = boxes[:, None, :2] + 10 * _random(2, 17, 2).abs().clamp(max=2)
        target["keypoints"] = torch.cat([places, torch.ones(2, 17, 1)], -1)
    return (_images()[0], [dict(target), dict(target)])  # type: ignore[index]


def _flow() -> Inputs:
    first, second = _random(2, 1, 3, 128, 128).tanh()
    return (first, second, 2)

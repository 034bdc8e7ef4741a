"""The wheel of torchvision is built for CUDA; beside a torch for the CPU its operators do not load, and importing it
fails at the first two of them. timm and torchmetrics import it, and need none: declarations stand for the two."""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

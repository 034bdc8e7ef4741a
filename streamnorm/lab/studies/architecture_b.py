"""Architecture B on CIFAR-10, shortened: the run that several studies vary, and its sizes."""

from __future__ import annotations

from typing import Any

from streamnorm.lab.runs.classifier.run import Run

BASE = Run(data="cifar10", architecture="B", width=16, epochs=5, train_limit=10_000)
TIERS: dict[str, dict[str, Any]] = {
    "smoke": {"data": "digits", "width": 4, "epochs": 1, "train_limit": 128, "test_limit": 64},
    "reduced": {},
    "full": {"width": 32, "epochs": 30, "train_limit": None},
}
"""What the sizes of a study change in every run."""

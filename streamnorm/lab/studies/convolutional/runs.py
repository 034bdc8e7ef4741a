"""The runs of the study ``convolutional``."""

from __future__ import annotations

from dataclasses import replace

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.architecture_b import BASE

FIGURE_6 = replace(
    BASE, arm="streaming", samples_per_batch=32, batches_per_update=1, alpha=(0.5, 0.5), beta=(0.5, 0.5, 0.0)
)

RUNS: dict[str, Run] = {
    "batch 32 x 1": replace(BASE, arm="batch", samples_per_batch=32, batches_per_update=1),
    "layer 32 x 1": replace(BASE, arm="layer", samples_per_batch=32, batches_per_update=1),
    "streaming Figure 6, 32 x 1": replace(FIGURE_6, center="batch"),
    "streaming 1 x 32": replace(BASE, arm="streaming", samples_per_batch=1, batches_per_update=32),
    "streaming Figure 6 in Setting B, 32 x 1": replace(FIGURE_6, center="estimate"),
    "none 32 x 1": replace(BASE, arm="none", samples_per_batch=32, batches_per_update=1),
}

"""The two runs of the study ``specialcase``, which differ in what they are tested with."""

from __future__ import annotations

from dataclasses import replace

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.architecture_b import BASE

AVERAGE, LAST = "batch 32 x 1", "special case 32 x 1"
_BATCH = replace(BASE, arm="batch", samples_per_batch=32, batches_per_update=1, epochs=3)
_SETTINGS = {"alpha": (0.0, 1.0), "beta": (0.0, 0.0, 1.0), "kappa": (0.0, 1.0, 0.0, 1.0)}
RUNS: dict[str, Run] = {AVERAGE: _BATCH, LAST: replace(_BATCH, arm="streaming", center="batch", **_SETTINGS)}

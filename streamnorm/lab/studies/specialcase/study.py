"""Testing with the last mini-batch's statistics, or with a running average (paper, section 3.3.3).

    streamnorm reproduce specialcase --data-root DATA

With n = 1, alpha = (0, 1) and beta = (0, 0, 1) streaming trains as batch normalization does, and its estimate for
testing is the last mini-batch's. Architecture B as in ``convolutional``: 10,000 images of CIFAR-10, here 3 epochs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.studies.architecture_b import BASE, TIERS
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.study import Claim, Records, Verdict, below, carry_out, final, judge, spread

AVERAGE, LAST = "batch 32 x 1", "special case 32 x 1"
_BATCH = replace(BASE, arm="batch", samples_per_batch=32, batches_per_update=1, epochs=3)
_SETTINGS = {"alpha": (0.0, 1.0), "beta": (0.0, 0.0, 1.0), "kappa": (0.0, 1.0, 0.0, 1.0)}
RUNS: dict[str, Run] = {AVERAGE: _BATCH, LAST: replace(_BATCH, arm="streaming", center="batch", **_SETTINGS)}


def _c36(records: Records) -> tuple[Verdict, str]:
    errors = {name: final(records, name) for name in RUNS}
    worse = below(errors[AVERAGE], errors[LAST])
    losses = {name: final(records, name, "train_loss") for name in RUNS}
    apart = below(losses[AVERAGE], losses[LAST])
    figures = f"test error: running average {spread(errors[AVERAGE])}, last mini-batch {spread(errors[LAST])}, "
    figures += f"worse by {spread(worse)}; training losses apart by {spread(apart)} nats"
    return judge([0.015 - d for d in worse], 0, sign_alone_is_partly=False), figures


CLAIMS = [Claim("C-36", "Testing with the last mini-batch's statistics works well (section 3.3.3).", _c36)]


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claim, write the report."""
    from streamnorm.lab.runs.classifier.data import load
    from streamnorm.lab.studies.record import write_results

    size, out = begin(arguments, "specialcase", TIERS)
    base = replace(BASE, **size)
    data = load(base.data, arguments.data_root, train_limit=base.train_limit, test_limit=base.test_limit)
    records = carry_out({name: replace(run, **size) for name, run in RUNS.items()}, arguments.seeds_or(), data, out)
    title = f"The special case of section 3.3.3: {data.name}, architecture B, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title)

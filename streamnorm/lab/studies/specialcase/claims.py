"""What the paper says about the last mini-batch's statistics, checked on the records of ``specialcase``."""

from __future__ import annotations

from streamnorm.lab.studies.specialcase.runs import AVERAGE, LAST, RUNS
from streamnorm.lab.studies.study import Claim, Records, Verdict, below, final, judge, spread


def _c36(records: Records) -> tuple[Verdict, str]:
    errors = {name: final(records, name) for name in RUNS}
    worse = below(errors[AVERAGE], errors[LAST])
    losses = {name: final(records, name, "train_loss") for name in RUNS}
    apart = below(losses[AVERAGE], losses[LAST])
    figures = f"test error: running average {spread(errors[AVERAGE])}, last mini-batch {spread(errors[LAST])}, "
    figures += f"worse by {spread(worse)}; training losses apart by {spread(apart)} nats"
    return judge([0.015 - d for d in worse], 0, sign_alone_is_partly=False), figures


CLAIMS = [Claim("C-36", "Testing with the last mini-batch's statistics works well (section 3.3.3).", _c36)]

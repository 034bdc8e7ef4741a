"""What the paper says about the mini-batches of a weight update, checked on the records of ``accumulation``."""

from __future__ import annotations

from streamnorm.lab.studies.accumulation.runs import PER_UPDATE, name_of
from streamnorm.lab.studies.study import Claim, Records, Verdict, final, judge, mean, spread, together

MEASURES = {"C": "train_loss", "RNN": "validation_loss"}
"""What the gain is measured in: losses in nats."""


def _c65(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for network, key in MEASURES.items():
        losses = {n: final(records, name_of(network, n), key) for n in PER_UPDATE}
        one, two, most = (losses[n] for n in (1, 2, max(PER_UPDATE)))
        # Two are enough if they are no further behind the most than a fifth of what these gain on one.
        room = [max(0.0, a - c) / 5 - (b - c) for a, b, c in zip(one, two, most, strict=True)]
        parts.append(judge(room, 0, sign_alone_is_partly=False))
        gain = mean([a - c for a, c in zip(one, most, strict=True)])
        said = ", ".join(f"{n} B/U {spread(of)}" for n, of in losses.items())
        figures.append(f"{network} {said} ({max(PER_UPDATE)} gain {gain:.4f} on 1)")
    return together(parts), f"loss in nats, training in C, validation in the RNN: {'; '.join(figures)}"


CLAIMS = [
    Claim(
        "C-65",
        "Two mini-batches an update are often enough (footnote 3).",
        _c65,
        tuple(name_of(network, n) for network in MEASURES for n in PER_UPDATE),
    )
]

"""What is claimed of the default with small batches, checked on the records of ``smallbatch``."""

from __future__ import annotations

from collections.abc import Sequence

from streamnorm.lab.studies.smallbatch.runs import BY_BATCH, SHORT, STABLE, UPDATE, name_of
from streamnorm.lab.studies.study import (
    CHANCE,
    Claim,
    Record,
    Records,
    Verdict,
    below,
    end_errors,
    mean,
    spread,
    together,
)


def in_training(records: Records, name: str) -> list[float]:
    """In training mode, of each seed."""
    return [CHANCE if r["training_mode_error"] is None else r["training_mode_error"] for r in records[name]]


def at_least(differences: Sequence[float], margin: float) -> Verdict:
    """Of the mean of paired differences."""
    return "reproduced" if mean(differences) >= margin else "contradicted"


def _fully_connected(records: Records) -> tuple[Verdict, str]:
    own, batch, layer = (
        end_errors(records, f"A {name}") for name in ("default 1 x 64", "batch 64 x 1", "layer 64 x 1")
    )
    verdict = together([at_least(below(own, batch), -0.003), at_least(below(own, layer), 0)])
    return (
        verdict,
        f"default {spread(own)}, below batch by {spread(below(own, batch))}, layer by {spread(below(own, layer))}",
    )


def _convolutional(records: Records) -> tuple[Verdict, str]:
    own, batch, group = (
        end_errors(records, f"B {name}") for name in ("default 1 x 32", "batch 32 x 1", "group 32 x 1")
    )
    verdict = together([at_least(below(own, batch), -0.015), at_least(below(own, group), 0.08)])
    return (
        verdict,
        f"default {spread(own)}, below batch by {spread(below(own, batch))}, group by {spread(below(own, group))}",
    )


def failed(records: Sequence[Record]) -> int:
    """How many could not train to their end."""
    return sum(bool(record["failed"]) for record in records)


def _nothing_diverges(records: Records) -> tuple[Verdict, str]:
    own = {name: runs for name, runs in records.items() if runs[0]["arm"] == "default"}
    many = [f"{n.removeprefix(STABLE)} {failed(r)} of {len(r)} seeds" for n, r in own.items() if n.startswith(STABLE)]
    lost = sum(map(failed, own.values()))
    others = {n: failed(r) for n, r in records.items() if n not in own and failed(r)}
    figures = [*many, f"of all runs of the default {lost} of {sum(map(len, own.values()))}"]
    figures += [f"{name} {count}" for name, count in others.items()]
    return ("contradicted" if lost else "reproduced"), ", ".join(figures)


def _modes(records: Records) -> tuple[Verdict, str]:
    prefix = SHORT if any(name.startswith(SHORT) for name in records) else ""
    told = []
    for architecture in UPDATE:
        for arm in BY_BATCH:
            name = name_of(architecture, arm, 2)
            if prefix + name in records:
                gap = below(in_training(records, prefix + name), end_errors(records, prefix + name))
                told.append(f"{name}: {spread(gap)}")
    return "reported", "error in testing mode less that in training mode, " + "; ".join(told)


CLAIMS = [
    Claim("SB-1", "A at 1 x 64: the default is within 0.3 points of batch at 64 and below layer.", _fully_connected),
    Claim("SB-2", "B at 1 x 32: it is within 1.5 points of batch at 32 and 8 points below group.", _convolutional),
    Claim("SB-3", "It never diverges, in many seeds at rate 0.1 either.", _nothing_diverges),
    Claim("SB-4", "How far testing is from training at 2 samples a batch.", _modes),
]

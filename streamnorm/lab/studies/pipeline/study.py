"""From training to testing with batch normalization: "Batch Normalization: The Untold Story" (seed 001).

    streamnorm reproduce pipeline --data-root DATA --tier reduced

Method ONE tests with the running average of training, method TWO with statistics of a pass over the training data after
it. Architecture A, trained with mini-batches of 64; then the pass with mini-batches of several sizes, beside the exact
statistics of all data. A stopped study goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamnorm.lab.runs.classifier.data import load
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.pipeline.claims import CLAIMS, figure, sizes_of
from streamnorm.lab.studies.pipeline.runs import TIERS, examine, runs
from streamnorm.lab.studies.record import write_results
from streamnorm.lab.studies.study import Records, carry_out, spread


def table(records: Records) -> str:
    """Every way to come by the statistics of testing, one a row."""
    lines = [
        "| statistics of testing | test error | test loss (nats) | means off by (sigmas) | sigmas off by (log) |",
        "| :--- | ---: | ---: | ---: | ---: |",
    ]
    words = {"moving": "moving average", "corrected": "the same, corrected", "single": "pooled, a single pass"}
    named: Mapping[str, str] = {
        "one": "running average of training (ONE)",
        "exact": "of all data, exact",
        **{f"{way} {m}": f"{what}, m = {m}" for way, what in words.items() for m in sizes_of(records)},
    }
    for way, what in named.items():
        cells = [spread(figure(records, way, key)) for key in ("test_error", "test_loss", "mean", "sigma")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Arguments) -> Path:
    """Train what is missing, measure, check the claims, write the report."""
    tier, out = begin(arguments, "pipeline", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.limit)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out)
    examine(records, data, out, tier.sizes)
    title = f"Batch normalization from training to testing: {data.name}, architecture A, tier {arguments.tier}"
    return write_results(records, CLAIMS, out, title, table(records))

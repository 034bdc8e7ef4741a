"""How many mini-batches a weight update should take together where streaming normalizes in loops (paper, footnote 3).

    streamnorm reproduce accumulation --data-root DATA

1, 2, 4 and 8 mini-batches of 8 samples an update, in C(5, 5) and in an RNN, as Figures 9 and 11 have streaming (L2,
Setting B, alpha = (.7, .3), beta = (.7, 0, .3)). All see the same number of samples at the same rate, so more
mini-batches an update are fewer updates. A run is trained once, whichever study asks for it; its record lies in the
folder ``records`` beside that of the study. A stopped study goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.studies.accumulation.claims import CLAIMS
from streamnorm.lab.studies.accumulation.runs import TIERS, runs
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.once import carry_out_once, folder_of
from streamnorm.lab.studies.panels import picture
from streamnorm.lab.studies.record import keep, lines_of, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Record, Records, final, spread


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict and a table for each network; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    c, rnn = ({name: of for name, of in records.items() if name.startswith(which)} for which in ("C ", "RNN "))
    checkpoint.write(out / "curves.png", picture({title: of for title, of in (("C(5, 5)", c), ("RNN", rnn)) if of}))
    lines = [*opening(next(iter(records.values()))[0], title), *verdicts(records, CLAIMS), ""]
    lines += ["## C(5, 5)", "", summary(c)] if c else []
    lines += ["## RNN", "", lines_of(rnn, ["run", "seeds", "last validation loss (nats)"], _loss), ""] if rnn else []
    return page([*lines, "![Curves](curves.png)", ""], out)


def _loss(name: str, able: Sequence[Record]) -> list[str]:
    return [f"{len(able)}", spread(final({name: able}, name, "validation_loss"))]


def main(arguments: Arguments) -> Path:
    """Train what no record holds, check the claims, write the record."""
    tier, out = begin(arguments, "accumulation", TIERS)
    records = carry_out_once(runs(tier), arguments.seeds_or(), arguments.data_root, folder_of(out))
    return write_results(records, out, f"Mini-batches of an update, tier {arguments.tier}")

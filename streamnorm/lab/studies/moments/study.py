"""Moments of every order, and Settings A, B and C (paper, sections 3.4 and 7.2, Figure 3).

    streamnorm reproduce moments --data-root DATA

Figure 3: batch normalization of architecture B with p = 1 ... 7. L1 beside L2 where streaming normalizes: A at 1 S/B x
64 B/U, C(5, 5) and an RNN at 32 x 2. Streaming in Settings A, B and C with p = 1 and 2 at 1, 2 and 32 samples a batch,
32 an update, on A and B. A run is trained once, whichever study asks for it; its record lies in the folder ``records``
beside that of the study. A stopped study goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.moments.claims import CLAIMS
from streamnorm.lab.studies.moments.runs import TIERS, Tier, figure_3, first_and_second, runs, settings
from streamnorm.lab.studies.once import carry_out_once, folder_of
from streamnorm.lab.studies.panels import picture
from streamnorm.lab.studies.record import keep, lines_of, opening, page, summary, verdicts
from streamnorm.lab.studies.study import Record, Records, final, spread


def write_results(records: Records, tier: Tier, out: Path, title: str) -> Path:
    """``results.md`` with the verdicts and a table for each figure; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    shown = {"Figure 3": [*figure_3(tier)], "L1 and L2": [*first_and_second(tier)], "Settings": [*settings(tier)]}
    named = {figure: {name: records[name] for name in names if name in records} for figure, names in shown.items()}
    networks = {name: of for name, of in named["L1 and L2"].items() if not name.startswith("RNN")}
    speaks = {name: of for name, of in named["L1 and L2"].items() if name not in networks}
    rows = {"Figure 3": named["Figure 3"], "L1 and L2": networks, "L1 and L2 in an RNN": speaks}
    checkpoint.write(out / "curves.png", picture({title: of for title, of in rows.items() if of}))
    lines = [*opening(next(iter(records.values()))[0], title), *verdicts(records, CLAIMS), ""]
    for figure, of in (("Figure 3", named["Figure 3"]), ("L1 and L2", networks), ("Settings", named["Settings"])):
        lines += [f"## {figure}", "", summary(of)] if of else []
    if speaks:
        lines += ["## RNN", "", lines_of(speaks, ["run", "seeds", "last validation loss (nats)"], _loss), ""]
    return page([*lines, "![Curves](curves.png)", ""], out)


def _loss(name: str, able: Sequence[Record]) -> list[str]:
    return [f"{len(able)}", spread(final({name: able}, name, "validation_loss"))]


def main(arguments: Arguments) -> Path:
    """Train what no record holds, check the claims, write the record."""
    tier, out = begin(arguments, "moments", TIERS)
    records = carry_out_once(runs(tier), arguments.seeds_or(), arguments.data_root, folder_of(out))
    return write_results(records, tier, out, f"Moments and settings, tier {arguments.tier}")

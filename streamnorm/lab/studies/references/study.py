"""Every reference of Figure 1, without a stream and with one (paper, section 7.4 and appendix, Figures 6, 7 and A1).

    streamnorm reproduce references --data-root DATA

Figures 6 and 7: SP1 ... SP5, BA1 ... BA6 and streaming (L2, Setting A, alpha = (.5, .5), beta = (.5, .5, 0)) in
architectures B and C(5, 1), 32 S/B x 1 B/U. Figure A1: all of them streamed by the same values, in B. In C a statistic
of a mini-batch is tested with a running estimate of each time step (section 4.2). A run is trained once, whichever
study asks for it; its record lies in the folder ``records`` beside that of the study. A stopped study goes on with the
same command.
"""

from __future__ import annotations

from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.once import carry_out_once, folder_of
from streamnorm.lab.studies.panels import picture
from streamnorm.lab.studies.record import keep, opening, page, summary, verdicts
from streamnorm.lab.studies.references.claims import CLAIMS, FIGURES
from streamnorm.lab.studies.references.runs import TIERS, runs
from streamnorm.lab.studies.study import Records


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdicts and a table for each figure; beside it ``results.json`` and ``curves.png``."""
    keep(records, out, title)
    named = {figure: {name: records[name] for name in names if name in records} for figure, names in FIGURES.items()}
    named = {figure: of for figure, of in named.items() if of}
    checkpoint.write(out / "curves.png", picture(named))
    lines = [*opening(next(iter(records.values()))[0], title), *verdicts(records, CLAIMS), ""]
    for figure, of in named.items():
        lines += [f"## {figure}", "", summary(of)]
    return page([*lines, "![Curves](curves.png)", ""], out)


def main(arguments: Arguments) -> Path:
    """Train what no record holds, check the claims, write the record."""
    tier, out = begin(arguments, "references", TIERS)
    records = carry_out_once(runs(tier), arguments.seeds_or(), arguments.data_root, folder_of(out))
    return write_results(records, out, f"References, tier {arguments.tier}")

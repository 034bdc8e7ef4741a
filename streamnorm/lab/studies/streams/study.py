"""Learning from streams, one row and one weight update at a time, with and without normalization.

    streamnorm reproduce streams --data-root DATA

Every row is predicted, then learned (test-then-train). Five real streams and three generators that change, features raw
and standardized as they come, SGD and Adam at several rates. Arms that only an ordinary loop serves, at a hundred times
the cost of compiled steps, learn from the first rows alone in the smaller tiers, and at fewer settings; all comparisons
are made on the same rows. A stopped study goes on with the same command.
"""

from __future__ import annotations

from pathlib import Path

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import keep, opening, page, verdicts
from streamnorm.lab.studies.streams.claims import (
    CLAIMS,
    STABLE,
    VIEWS,
    WHOLE,
    accuracies,
    arms_of,
    around,
    best,
    gains,
    rows_of,
    settings,
    signed,
)
from streamnorm.lab.studies.streams.figures import around_drift, heat_map, over_rates
from streamnorm.lab.studies.streams.runs import FEATURES, LEFT_OUT, TIERS, Source, Tier, carry_out, many_seeds, runs
from streamnorm.lab.studies.study import Records, spread


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def best_rates(records: Records, features: str) -> list[str]:
    """A table: each arm on each stream at its best setting, over its own rows."""
    lines = []
    for arm in arms_of(records):
        line = [arm]
        for view in VIEWS:
            cells = settings(records, view, features, arm)
            if not cells:
                line.append("")
                continue
            rows = rows_of(view, cells.values())
            optimizer, rate = setting = best(cells, rows)
            line.append(f"{spread(accuracies(cells[setting], rows))} ({optimizer} {rate:g}, {rows:,} rows)")
        lines.append(line)
    return _table(["arm", *(view.name for view in VIEWS)], lines)


def differences(records: Records, features: str) -> list[str]:
    """A table: the default less each other arm, at best settings, on the rows and over the settings of both."""
    lines = []
    for arm in arms_of(records):
        if arm != "default":
            each = [gains(records, view, features, "default", arm) for view in VIEWS]
            lines.append([f"default less {arm}", *(signed(own) if own else "" for own in each)])
    return _table(["", *(view.name for view in VIEWS)], lines)


def drifts(records: Records, window: int) -> list[str]:
    """A table: accuracy before and after a change, at the setting that is best over the rows that
    all arms have."""
    lines = []
    for view in WHOLE:
        found = {arm: own for arm in arms_of(records) if (own := settings(records, view, "raw", arm))}
        if not found or next(r["drift"] for cells in found.values() for own in cells.values() for r in own) is None:
            continue
        rows = rows_of(view, [own for cells in found.values() for own in cells.values()])
        for arm, cells in found.items():
            own = cells[best(cells, rows)]
            parts = zip(*(around(record, window) for record in own), strict=True)
            figures = [*(spread(list(part)) for part in parts), spread(accuracies(own, rows))]
            lines.append([f"{view.name}, {rows:,} rows", arm, *figures])
    titles = [f"{window} rows before", f"{window} after", f"{2 * window} after", "over all rows"]
    return _table(["stream", "arm", *titles], lines)


def _limits(records: Records, tier: Tier) -> list[str]:
    """What was run with less than everything, in words."""
    looped = sorted(
        {f"{own[0]['arm']} with {own[0]['optimizer']}" for own in records.values() if own[0]["by"] == "a loop"}
    )
    said = [f"Cannot learn from one sample at a time, and left out: {', '.join(LEFT_OUT)}."] if LEFT_OUT else []
    if looped:
        rates = tier.loop_rates or tier.rates
        told = ", ".join(f"{name} {' '.join(f'{r:g}' for r in own)}" for name, own in rates.items())
        said.append(
            f"Served by an ordinary loop alone, and so run on the first {tier.loop_rows:,} rows, with features "
            f"{' and '.join(tier.loop_features)}, at {told}: {', '.join(looped)}. They are compared with others on "
            "those rows and at those rates."
        )
    return [" ".join(said), ""] if said else []


def write_results(records: Records, tier: Tier, out: Path, title: str) -> Path:
    """``results.md`` with verdicts and tables; beside it ``results.json`` and the pictures."""
    keep(records, out, title)
    pictures = {"heat.png": heat_map, "rates.png": over_rates, "drift.png": around_drift}
    for name, draw in pictures.items():
        checkpoint.write(out / name, draw(records))
    everything = [record for own in records.values() for record in own]
    sources = dict.fromkeys((r["stream"], r["source"].split(", seed")[0], r["of"], r["drift"]) for r in everything)
    said = [
        f"{stream}: {rows:,} rows{f', a change after {drift:,}' if drift else ''} ({source})"
        for stream, source, rows, drift in sources
    ]
    first = {**everything[0], "data": f"{len(said)} streams", "source": "; ".join(said) + "."}
    seeds = sorted({r["seed"] for name, own in records.items() if not name.startswith(STABLE) for r in own})
    lines = [*opening(first, title), *_limits(records, tier)]
    lines += [f"Seeds {' '.join(map(str, seeds))}; mean ± sd over them; accuracy is of rows not yet learned.", ""]
    lines += [*verdicts(records, CLAIMS), ""]
    for features in FEATURES:
        if any(own[0]["features"] == features for own in records.values()):
            lines += [f"## {features.capitalize()} features, each arm at its best rate", ""]
            lines += [*best_rates(records, features), "", *differences(records, features), ""]
    lines += ["## Around a change, raw features", "", *drifts(records, tier.window), ""]
    lines += ["![Best rates](heat.png)", "", "![Rates](rates.png)", "", "![Around a change](drift.png)", ""]
    return page(lines, out)


def main(arguments: Arguments) -> Path:
    """Do what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "streams", TIERS, side_by_side=True)
    source = Source(arguments.data_root, tier.made_up)
    wanted, many = runs(tier, arguments.seeds_or(tier.seeds)), many_seeds(tier)
    names = {path: run for run in [*wanted, *many] for path in [(run.name, run.seed)]}
    done = carry_out(names.values(), source, out, arguments.processes, arguments.threads)
    by_seed = {name: {record["seed"]: record for record in own} for name, own in done.items()}
    records: dict[str, list] = {}
    for run in wanted:
        records.setdefault(run.name, []).append(by_seed[run.name][run.seed])
    for run in many:
        records.setdefault(STABLE + run.name, []).append(by_seed[run.name][run.seed])
    return write_results(records, tier, out, f"Streams, tier {arguments.tier}")

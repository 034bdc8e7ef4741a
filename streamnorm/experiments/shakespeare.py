"""Character-level language models of Shakespeare (paper, section 7.6, Figures 11 and 12).

    python -m streamnorm.experiments.shakespeare --data-root DATA --tier reduced

RNN and GRU of 100 units, the Manhattan rule, 64 streams an update, chunks of 100 characters: time-specific and layer
normalization at 64 S/B x 1 B/U, streaming at 32 x 2 (L2, Setting B, alpha = (.7, .3), beta = (.7, 0, .3)). For a seed
every arm has the same weights and order of text. All are validated every 20 updates, that is after as many characters;
the paper says every 20 mini-batches. A stopped study goes on with the same command.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from streamnorm.experiments.study import Claim, Record, Records, Verdict, judge, mean, spread
from streamnorm.experiments.textcurves import picture
from streamnorm.training.checkpoint import write
from streamnorm.training.language import LanguageModel, bits, build, losses, statistics_kept, tested
from streamnorm.training.language_loop import train_text, trained
from streamnorm.training.text import Text, load_text
from streamnorm.training.textrun import TextRun


@dataclass(frozen=True)
class Tier:
    """The size of a study: which text, how much of it, how large the networks and for how long.

    Attributes:
        validate_every: updates between two validations.
        lengths: time steps of the sequences that are tested, the trained ones first.
    """

    data: str
    limit: int | None
    hidden: int
    steps: int
    streams: int
    epochs: int
    validate_every: int
    lengths: tuple[int, ...]


TIERS = {
    "smoke": Tier("pydoc", 4_000, 8, 10, 8, 1, 5, (10, 20, 40)),
    "reduced": Tier("tinyshakespeare", None, 100, 100, 64, 3, 20, (100, 200, 400)),
    "full": Tier("shakespeare", None, 100, 100, 64, 3, 20, (100, 200, 400)),
}


def runs(tier: Tier) -> dict[str, TextRun]:
    """Every run of the study by name: the three arms of each figure, and what single claims ask for."""
    shared = TextRun(
        data=tier.data,
        limit=tier.limit,
        hidden=tier.hidden,
        steps=tier.steps,
        epochs=tier.epochs,
        samples_per_batch=tier.streams,
        batches_per_update=1,
        validate_every=tier.validate_every,
    )
    named: dict[str, TextRun] = {}
    archs: tuple[Literal["rnn", "gru"], ...] = ("rnn", "gru")
    for arch in archs:
        whole = replace(shared, arch=arch)
        two = {"samples_per_batch": tier.streams // 2, "batches_per_update": 2}
        halves = replace(whole, arm="streaming", validate_every=2 * tier.validate_every, **two)
        named |= {
            f"{arch} tsbn": replace(whole, arm="tsbn"),
            f"{arch} layer": replace(whole, arm="layer"),
            f"{arch} streaming": halves,
            f"{arch} streaming, ReLU": replace(halves, nonlinearity="relu"),
        }
        if arch == "rnn":
            named |= {
                "rnn streaming, 1 B/U": replace(whole, arm="streaming"),
                "rnn streaming, latest statistics back": replace(halves, backward_stats="latest"),
                "rnn streaming, state reset": replace(halves, carry_state=False),
                "rnn tsbn, state reset": replace(whole, arm="tsbn", carry_state=False),
                "rnn batch": replace(whole, arm="batch"),
            }
    return named


def carry_out(
    named: Mapping[str, TextRun],
    seeds: Sequence[int],
    text: Text,
    lengths: Sequence[int],
    out: Path,
    say: Callable[[str], None] = print,
) -> dict[str, list[Record]]:
    """Train every run with every seed, seed by seed, and test each at all lengths."""
    records: dict[str, list[Record]] = {name: [] for name in named}
    for seed in seeds:
        for name, run in named.items():
            folder = out / name.replace(",", "").replace("/", "").replace(" ", "-") / f"seed{seed}"
            record = {**train_text(replace(run, seed=seed), text, folder), "label": name}
            if not record["failed"]:
                record |= examined(trained(folder)[1], text, run.steps, lengths)
            records[name].append(record)
            last = record["metrics"][-1] if record["metrics"] else {}
            say(f"{name}, seed {seed}: " + (record["failed"] or f"validation loss {last['validation_loss']:.4f} nats"))
    return records


def examined(model: LanguageModel, text: Text, steps: int, lengths: Sequence[int]) -> Record:
    """What is asked of a trained model: its loss at each length, along the longest, and how its statistics drift."""
    at, along = {}, torch.zeros(0)
    for length in lengths:
        sums, counts = losses(model, text.validation, length)
        at[str(length)] = (sums.sum() / counts.sum()).item()
        along = sums / counts
    drift, noise = statistics_over_time(model, text, steps)
    kept = statistics_kept(model)
    return {"lengths": at, "along": along.tolist(), "statistics": kept, "drift": drift, "noise": noise}


def statistics_over_time(model: LanguageModel, text: Text, steps: int) -> tuple[float, float]:
    """How far the mean of ``W_h h_{t-1}`` moves over the time steps of validation sequences, in its own deviations; and
    how far it would seem to move by chance, with so many sequences."""
    n = (len(text.validation) - 1) // steps
    cell = model.recurrent.cells["l0"]
    with tested(model):
        x = torch.nn.functional.one_hot(text.validation[: n * steps].view(n, steps).T, model.symbols).float()
        h, _ = model.recurrent(x)
        a = h @ cell.weight_hh[-model.recurrent.hidden_size :].T  # type: ignore[index]  the rows of h_new come last
    sigma, mu = torch.std_mean(a.double(), dim=1)
    sigma = sigma.mean(0).clamp(min=1e-12)
    return (mu.std(0) / sigma).mean().item(), n**-0.5


# --- Claims


def lowest(records: Records, name: str) -> list[float]:
    """The lowest validation loss of each seed; nan for a run that failed."""
    return [
        min(line["validation_loss"] for line in r["metrics"]) if r["metrics"] and not r["failed"] else math.nan
        for r in records[name]
    ]


def reached(record: Record, level: float) -> float:
    """After how many characters the validation loss was first at ``level``, between validations by a straight line."""
    before: tuple[float, float] | None = None
    for line in record["metrics"]:
        seen, loss = line["characters"], line["validation_loss"]
        if loss <= level:
            if before is None or before[1] == loss:
                return seen
            return before[0] + (seen - before[0]) * (before[1] - level) / (before[1] - loss)
        before = seen, loss
    return math.inf


def faster(records: Records, name: str, than: str) -> list[float]:
    """For each seed, how many times as fast ``name`` reached the losses that ``than`` had at quarters of its training
    (the median), less 1."""
    gains = []
    for record, other in zip(records[name], records[than], strict=True):
        lines = other["metrics"]
        if record["failed"] or other["failed"] or not lines:
            gains.append(math.nan)
            continue
        levels = [lines[max(0, len(lines) * k // 4 - 1)]["validation_loss"] for k in (1, 2, 3, 4)]
        gains.append(statistics.median(reached(other, level) / reached(record, level) for level in levels) - 1)
    return gains


def lower(records: Records, name: str, than: str) -> list[float]:
    """How much lower the lowest validation loss of ``name`` is, seed by seed, in nats."""
    return [b - a for a, b in zip(lowest(records, name), lowest(records, than), strict=True)]


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim with several parts."""
    if set(verdicts) == {"reproduced"}:
        return "reproduced"
    return "contradicted" if set(verdicts) == {"contradicted"} else "partly"


def _c28(records: Records) -> tuple[Verdict, str]:
    gains = {arm: faster(records, f"rnn {arm}", "rnn layer") for arm in ("tsbn", "streaming")}
    figures = ", ".join(f"{arm} {spread([g + 1 for g in gain])}" for arm, gain in gains.items())
    return together([judge(gain, 0) for gain in gains.values()]), f"times as fast as layer: {figures}"


def _c29(records: Records) -> tuple[Verdict, str]:
    gaps = {arm: lower(records, "rnn streaming", f"rnn {arm}") for arm in ("tsbn", "layer")}
    figures = ", ".join(f"below {arm} by {spread(gap)}" for arm, gap in gaps.items())
    return together([judge(gap, 0) for gap in gaps.values()]), f"streaming {figures} nats"


def _c30(records: Records) -> tuple[Verdict, str]:
    gain, gap = faster(records, "gru streaming", "gru layer"), lower(records, "gru streaming", "gru tsbn")
    figures = f"{spread([g + 1 for g in gain])} times as fast as layer, below tsbn by {spread(gap)} nats"
    return together([judge(gain, 0), judge(gap, 0)]), figures


def _roughness(record: Record) -> float:
    """The standard deviation of the steps of the validation loss in the second third, where the rate is still high."""
    curve = [line["validation_loss"] for line in record["metrics"]]
    part = curve[len(curve) // 3 : len(curve) * 2 // 3 + 1]
    steps = [b - a for a, b in pairwise(part)]
    return statistics.stdev(steps) if len(steps) > 1 else math.nan


def _c32(records: Records) -> tuple[Verdict, str]:
    one, two = "rnn streaming, 1 B/U", "rnn streaming"
    gap = lower(records, two, one)
    rough = [_roughness(a) - _roughness(b) for a, b in zip(records[one], records[two], strict=True)]
    verdict = together([judge(gap, -0.01, sign_alone_is_partly=False), judge(rough, 0, sign_alone_is_partly=False)])
    return verdict, f"2 B/U below 1 B/U by {spread(gap)} nats; deviation of the curve's steps less by {spread(rough)}"


def rise(record: Record) -> float:
    """How much more a character costs beyond the trained time steps than in the second half of them, in nats."""
    if record["failed"]:
        return math.nan
    steps = record["run"]["steps"]
    return mean(record["along"][steps:]) - mean(record["along"][steps // 2 : steps])


def _c34(records: Records) -> tuple[Verdict, str]:
    figures, verdicts = [], []
    for suffix in ("", ", state reset"):
        rises = {arm: [rise(r) for r in records[f"rnn {arm}{suffix}"]] for arm in ("streaming", "tsbn")}
        verdicts.append(judge([b - a for a, b in zip(rises["streaming"], rises["tsbn"], strict=True)], 0))
        figures += [f"{arm}{suffix} {spread(values)}" for arm, values in rises.items()]
    return together(verdicts), "rise beyond the trained steps, nats: " + ", ".join(figures)


def _c35(records: Records) -> tuple[Verdict, str]:
    gap = lower(records, "rnn streaming, latest statistics back", "rnn streaming")
    own = lowest(records, "rnn streaming")
    noise = max(0.01, statistics.stdev(own) if len(own) > 1 else 0)
    close = abs(mean(gap)) <= noise
    return ("reproduced" if close else "contradicted"), f"latest below saved by {spread(gap)} nats, noise {noise:.4f}"


def _c37(records: Records) -> tuple[Verdict, str]:
    ends = {arch: lowest(records, f"{arch} streaming, ReLU") for arch in ("rnn", "gru")}
    able = []
    for arch, end in ends.items():
        firsts = [
            r["metrics"][0]["validation_loss"] if r["metrics"] else 0.0 for r in records[f"{arch} streaming, ReLU"]
        ]
        able.append(all(last < first for last, first in zip(end, firsts, strict=True)))
    verdict: Verdict = "reproduced" if all(able) else "partly" if any(able) else "contradicted"
    return verdict, "lowest loss: " + ", ".join(f"{arch} {spread(end)}" for arch, end in ends.items())


def _c59(records: Records) -> tuple[Verdict, str]:
    drift = [r["drift"] / r["noise"] for r in records["rnn streaming"] if not r["failed"]]
    gap = lower(records, "rnn streaming", "rnn tsbn")
    visible: Verdict = "reproduced" if drift and min(drift) > 2 else "contradicted"
    figures = f"means move {spread(drift)} times as far as chance would have it; below tsbn by {spread(gap)} nats"
    return together([visible, judge(gap, -0.02)]), figures


def _c61(records: Records) -> tuple[Verdict, str]:
    kept: dict[str, dict[int, int]] = {arm: {} for arm in ("streaming", "tsbn")}
    for arm, of in kept.items():
        run = TextRun.from_json(records[f"rnn {arm}"][0]["run"])
        for steps in (run.steps, 2 * run.steps):
            model = build(run, 5)
            model(torch.randint(5, (steps, 4), generator=torch.Generator().manual_seed(0)))
            of[steps] = statistics_kept(model)
    constant = len(set(kept["streaming"].values())) == 1
    (short, few), (long, many) = kept["tsbn"].items()
    verdict: Verdict = "reproduced" if constant and many * short == few * long else "contradicted"
    return verdict, "numbers kept by time steps: " + ", ".join(f"{arm} {of}" for arm, of in kept.items())


CLAIMS = [
    Claim("C-28", "RNN: TSNB and SN converge faster than LN (Figure 11).", _c28),
    Claim("C-29", "RNN: SN reaches a slightly lower loss than TSNB and LN (Figure 11).", _c29),
    Claim("C-30", "GRU: SN converges faster than LN and reaches a lower loss than TSNB (Figure 12).", _c30),
    Claim("C-32", "Two batches an update help recurrent SN (sections 2 and 4.3).", _c32),
    Claim("C-34", "TSNB may not generalize to lengths it has not seen, SN does (Table 1).", _c34),
    Claim("C-35", "That statistics have moved on going back causes no problem (section 4.3).", _c35),
    Claim("C-37", "ReLU also works in the cells (section 5).", _c37),
    Claim("C-59", "SN without statistics per time step works although they drift (section 8).", _c59),
    Claim("C-61", "SN keeps one set of statistics, TSNB one per time step (section 4.3).", _c61),
]
"""C-33 (sequences of varying length) and C-36 (architecture B) are not checked here."""


# --- The record


def table(records: Records, lengths: Sequence[int]) -> str:
    """The figures of every run as a Markdown table."""
    head = ["run", "lowest validation loss (nats)", "bits", "last training loss (nats)"]
    head += [f"at {length} steps (nats)" for length in lengths] + ["statistics kept", "s/epoch"]
    lines = [head, [":---", *["---:"] * (len(head) - 1)]]
    for name, seeds in records.items():
        whole = [r for r in seeds if r["metrics"] and not r["failed"]]
        if not whole:
            lines.append([name, seeds[0]["failed"] or "", *[""] * (len(head) - 2)])
            continue
        low = [min(line["validation_loss"] for line in r["metrics"]) for r in whole]
        cells = [name, spread(low), f"{bits(mean(low)):.4f}", spread([r["metrics"][-1]["train_loss"] for r in whole])]
        cells += [spread([r["lengths"][str(length)] for r in whole]) for length in lengths]
        per_epoch = statistics.median(r["metrics"][-1]["seconds"] / r["metrics"][-1]["epoch"] for r in whole)
        lines.append([*cells, f"{whole[0]['statistics']}", f"{per_epoch:.1f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_results(records: Records, lengths: Sequence[int], out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and the table; beside it ``results.json`` and ``curves.png``."""
    write(out / "results.json", json.dumps({"title": title, "records": records}, indent=1, allow_nan=False) + "\n")
    figures = {
        f"{arch.upper()}": {name: r for name, r in records.items() if name.startswith(arch)} for arch in ("rnn", "gru")
    }
    write(out / "curves.png", picture(figures))
    first = next(iter(records.values()))[0]
    facts = [", ".join(f"{k} {v}" for k, v in first[part].items()) for part in ("versions", "machine")]
    lines = [f"# {title}", "", f"Data: {first['data']}. {first['source']}.", ""]
    lines += [f"Versions: {facts[0]}. Machine: {facts[1]}.", "", "| claim | verdict | figures |", "|---|---|---|"]
    for claim in CLAIMS:
        verdict, said = claim.check(records)
        lines.append(f"| {claim.id}: {claim.text} | **{verdict}** | {said} |")
        print(f"{claim.id} {verdict}: {said}")
    lines += ["", table(records, lengths), "![Curves](curves.png)", ""]
    write(out / "results.md", "\n".join(lines))
    return out / "results.md"


@dataclass(frozen=True)
class Arguments:
    """How large a study, where the data lie and where the runs are kept."""

    tier: Literal["smoke", "reduced", "full"] = "reduced"
    out: Path | None = None
    """Default: runs/shakespeare-TIER."""
    data_root: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int | None = None


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tier = TIERS[arguments.tier]
    out = arguments.out or Path("runs") / f"shakespeare-{arguments.tier}"
    text = load_text(tier.data, arguments.data_root, limit=tier.limit)
    records = carry_out(runs(tier), arguments.seeds, text, tier.lengths, out)
    return write_results(records, tier.lengths, out, f"Language models: {text.name}, tier {arguments.tier}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Arguments))

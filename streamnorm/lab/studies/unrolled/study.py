"""Unrolled convolutional networks (paper, sections 7.4 and 7.5, Figures 8, 9 and 10).

    streamnorm reproduce unrolled --data-root DATA --tier reduced

Architecture C with k1 = k2 = 5 and architecture D with k = 5. Streaming is the paper's of these figures: L2, Setting B,
alpha = (.7, .3), beta = (.7, 0, .3) unless a name says otherwise, at 32 S/B x 2 B/U; the others at 64 x 1. Errors in
training are those of the samples as they are trained on, in training mode. A stopped study goes on with the same
command.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamnorm.lab.runs import checkpoint
from streamnorm.lab.runs.classifier.architectures import build
from streamnorm.lab.runs.classifier.data import Data, load
from streamnorm.lab.runs.classifier.loop import Trainer, evaluate, reloop
from streamnorm.lab.runs.classifier.run import Run
from streamnorm.lab.runs.keeping import CHECKPOINT, finite
from streamnorm.lab.runs.language.model import statistics_kept
from streamnorm.lab.runs.summary import summarize, table
from streamnorm.lab.studies.arguments import Arguments, begin
from streamnorm.lab.studies.record import opening, verdicts
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    alike,
    below,
    carry_out,
    deviation,
    final,
    first_at,
    folder_of,
    judge,
    mean,
    number,
    spread,
    together,
    unrest,
)
from streamnorm.lab.studies.unrolled.figures import picture
from streamnorm.nn.timespecific import TimeSpecificNorm


@dataclass(frozen=True)
class Tier:
    """The size of a study: which data and how much of them, how large the networks and for how long.

    Attributes:
        width: of C; D, whose time step costs three times as much, has half of it.
        loops: k1, k2 and k.
    """

    data: str
    width: int
    loops: int
    epochs: int
    train_limit: int | None
    test_limit: int | None


TIERS = {
    "smoke": Tier("digits", 4, 2, 3, 128, 64),
    "reduced": Tier("cifar10", 16, 5, 4, 6_000, 1_000),  # at width 8 little is learned, and by tsbn alone
    "full": Tier("cifar10", 32, 5, 30, None, None),
}
BETAS = {
    "C streaming": (0.7, 0.0, 0.3),
    "C beta .7 .3 0": (0.7, 0.3, 0.0),
    "C beta 1 0 0": (1.0, 0.0, 0.0),
    "C beta 0 1 0": (0.0, 1.0, 0.0),
    "C beta 0 0 1": (0.0, 0.0, 1.0),
    "C beta 0 0 0": (0.0, 0.0, 0.0),
}
"""The choices of Figure 10."""
SLOWER = ("C streaming", "C beta 1 0 0", "C beta 0 0 0")
"""Those that are trained at a tenth of the learning rate as well: what comes an update late asks for smaller steps."""
FIGURES = {
    "Figure 8": ("D streaming", "D tsbn", "D streaming 64 x 1"),
    "Figure 9": ("C streaming", "C tsbn", "C batch", "C layer", "C streaming 64 x 1", "C streaming latest"),
    "Figure 10": tuple(BETAS),
    "Figure 10 at a tenth of the rate": tuple(f"{name}, rate .01" for name in SLOWER),
}
LONGER = ("C streaming", "C tsbn", "D streaming", "D tsbn")
"""What is tested with more loops than it was trained with."""


def runs(tier: Tier) -> dict[str, Run]:
    """Every run of the study by name."""
    shared = Run(
        data=tier.data,
        width=tier.width,
        epochs=tier.epochs,
        train_limit=tier.train_limit,
        test_limit=tier.test_limit,
        arm="streaming",
        beta=BETAS["C streaming"],
        samples_per_batch=32,
        batches_per_update=2,
    )
    c = replace(shared, architecture="C", loops=(tier.loops, tier.loops))
    d = replace(shared, architecture="D", loops=(tier.loops,), width=tier.width // 2)
    c64, d64 = (replace(run, samples_per_batch=64, batches_per_update=1) for run in (c, d))
    named = {
        "C streaming": c,
        "C tsbn": replace(c64, arm="tsbn"),
        "C batch": replace(c64, arm="batch"),
        "C layer": replace(c64, arm="layer"),
        "D streaming": d,
        "D tsbn": replace(d64, arm="tsbn"),
        **{name: replace(c, beta=beta) for name, beta in BETAS.items() if name != "C streaming"},
        "C streaming 64 x 1": c64,
        "C streaming latest": replace(c, backward_stats="latest"),
        "D streaming 64 x 1": d64,
    }
    slower = {
        f"{name}, rate .01": replace(named[name], learning_rate=named[name].learning_rate / 10) for name in SLOWER
    }
    return named | slower


def examine(records: Mapping[str, Sequence[Record]], data: Data, out: Path) -> None:
    """Add to the records of ``LONGER`` what is asked of their trained models: test loss by loops, up to twice as many
    as they were trained with, and how many numbers and sets of statistics their normalizations keep."""
    for name in LONGER:
        for record in (record for record in records[name] if not record["failed"]):
            run = Run.from_json(record["run"])
            trainer = Trainer(run, data)
            trainer.restore(checkpoint.load(folder_of(out, name, run.seed) / CHECKPOINT))
            k = run.loops[0]
            along = [(k, record["metrics"][-1]["test_loss"])]
            for longer in range(k + 1, 2 * k + 1):
                model = reloop(trainer, (longer,) * len(run.loops))
                along.append((longer, evaluate(model, data.test_x, data.test_y)[0]))
            kept = {"statistics": statistics_kept(trainer.model), "sets": sets_kept(trainer.model)}
            record |= {"along": finite(along), **kept}


def sets_kept(model: nn.Module) -> int:
    """How many sets of statistics the layer has that has most: one, or one for each time step."""
    return max((len(module.times) for module in model.modules() if isinstance(module, TimeSpecificNorm)), default=1)


# --- Claims


def training_error(record: Record, epochs: slice = slice(None)) -> float:
    """The mean over epochs; a run that failed counts as always wrong."""
    if record["failed"]:
        return 1.0
    return mean([line["train_error"] for line in record["metrics"][epochs]])


def last(records: Records, name: str, share: float = 0.0) -> list[float]:
    """The training error of each seed over the last ``share`` of the epochs, at least the last one."""
    return [training_error(r, slice(-max(1, round(share * r["run"]["epochs"])), None)) for r in records[name]]


def _c19(records: Records) -> tuple[Verdict, str]:
    gap = below(final(records, "D tsbn"), final(records, "D streaming"))
    able = {arm: [r for r in records[f"D {arm}"] if not r["failed"]] for arm in ("streaming", "tsbn")}
    one = all(r["sets"] == 1 for r in able["streaming"])
    each = all(r["sets"] == r["run"]["loops"][0] for r in able["tsbn"])
    stored: Verdict = "reproduced" if all(able.values()) and one and each else "contradicted"
    kept = [f"{arm} {of[0]['sets']} ({of[0]['statistics']} numbers)" for arm, of in able.items() if of]
    figures = f"test error streaming minus tsbn {spread(gap)}; sets of statistics a layer: {', '.join(kept) or 'none'}"
    return together([alike(gap, 0.01), stored]), figures


def _c20(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for other in FIGURES["Figure 9"][1:4]:
        end = below(last(records, "C streaming", 1 / 6), last(records, other, 1 / 6))
        area = below(*([training_error(r) for r in records[name]] for name in ("C streaming", other)))
        parts += [judge(end, 0), judge(area, 0)]
        figures.append(f"below {other} by {spread(end)} at the end and {spread(area)} over all epochs")
    return together(parts), "training error " + ", ".join(figures)


def times_as_fast(records: Records, name: str, than: str) -> list[float]:
    """For each seed, how many times as fast ``name`` came to the training errors that ``than`` had after 1/4, 1/2, 2/3,
    5/6 and all of its epochs (the median)."""

    def when(record: Record, level: float) -> float:
        return first_at(((line["epoch"], line["train_error"]) for line in record["metrics"]), level)

    gains = []
    for record, other in zip(records[name], records[than], strict=True):
        if record["failed"] or other["failed"]:
            gains.append(math.nan)
            continue
        lines = other["metrics"]
        ends = (max(1, round(part * len(lines))) for part in (1 / 4, 1 / 2, 2 / 3, 5 / 6, 1))
        levels = [lines[end - 1]["train_error"] for end in ends]
        gains.append(statistics.median(when(other, level) / when(record, level) for level in levels))
    return gains


def _c21(records: Records) -> tuple[Verdict, str]:
    gains = times_as_fast(records, "C streaming", "C layer")
    return judge([gain - 1 for gain in gains], 1), f"{spread(gains)} times as fast as layer"


def _c22(records: Records) -> tuple[Verdict, str]:
    shared, own = final(records, "C batch"), final(records, "C tsbn")
    # Failing is twice the error of tsbn, or 60 %; where tsbn is near that itself, 10 points more than it.
    beyond = [a - min(2 * b, max(0.6, b + 0.1)) for a, b in zip(shared, own, strict=True)]
    trained = below(last(records, "C batch"), last(records, "C tsbn"))
    endless = sum(r["metrics"][-1]["test_loss"] is None for r in records["C batch"] if not r["failed"])
    figures = f"test error batch {spread(shared)}" + f" (test loss not finite in {endless})" * bool(endless)
    figures += f", tsbn {spread(own)}; training errors apart by {spread(trained)}"
    return (judge(beyond, 0) if alike(trained, 0.03) == "reproduced" else "contradicted"), figures


def _c23(records: Records) -> tuple[Verdict, str]:
    test, train = final(records, "C tsbn"), last(records, "C tsbn")
    gap = below(train, test)
    # Learning normally is 20 points better than chance, and no more than 10 points worse in testing than in training.
    learns, generalizes = judge([0.7 - error for error in test], 0), judge([0.1 - d for d in gap], 0)
    return together([learns, generalizes]), f"test error {spread(test)}, above the training error by {spread(gap)}"


def mean_gradient(arm: str, batches: int, samples: int = 64) -> Tensor:
    """Of the weights of a small C(5, 5) in float64, over the same samples in so many mini-batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (samples,), generator=generator)
    model = build(Run(architecture="C", arm=arm, width=4), x[0], 10).double()
    for part, target in zip(x.chunk(batches), y.chunk(batches), strict=True):
        (F.cross_entropy(model(part), target) / batches).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _c24(records: Records) -> tuple[Verdict, str]:
    apart = {}
    for arm in ("layer", "batch"):
        one, two = mean_gradient(arm, 1), mean_gradient(arm, 2)
        apart[arm] = ((one - two).norm() / one.norm()).item()
    figures = ", ".join(f"{arm} {value:.1e}" for arm, value in apart.items())
    return ("reproduced" if apart["layer"] <= 1e-10 else "contradicted"), f"gradients apart by a share of {figures}"


def _errors(records: Records) -> dict[str, list[float]]:
    return {name: last(records, name) for name in BETAS}


def _c25(records: Records) -> tuple[Verdict, str]:
    errors = _errors(records)
    ignored = errors.pop("C beta 0 0 0")
    worst = max(errors, key=lambda name: mean(errors[name]))
    gap = below(errors[worst], ignored)
    sd = max(deviation(seeds) for seeds in (ignored, errors[worst]))
    figures = f"training error {spread(ignored)}, above the next ({worst}) by {spread(gap)}"
    return judge(gap, min(0.05, 3 * sd) if sd else 0.05), figures


def _c26(records: Records) -> tuple[Verdict, str]:
    errors = _errors(records)
    best = min(errors, key=lambda name: mean(errors[name]))
    ahead, behind = (below(errors["C beta 1 0 0"], errors[name]) for name in ("C beta 0 0 0", best))
    figures = f"training error below (0, 0, 0) by {spread(ahead)}, below the best ({best}) by {spread(behind)}"
    slower = ", ".join(f"{name} {spread(last(records, f'{name}, rate .01'))}" for name in SLOWER)
    lost = sum(bool(r["failed"]) for r in records["C beta 1 0 0"])
    figures += f"; {lost} of {len(behind)} seeds diverged; at a tenth of the rate: {slower}"
    return together([judge(ahead, 0), judge(behind, -0.05, sign_alone_is_partly=False)]), figures


def _c27(records: Records) -> tuple[Verdict, str]:
    errors = _errors(records)
    means = {name: mean(seeds) for name, seeds in errors.items()}
    by_seed = [{name: seeds[i] for name, seeds in errors.items()} for i in range(len(records["C streaming"]))]

    def holds(ranking: Mapping[str, float]) -> bool:
        ranks = sorted(sorted(ranking, key=lambda n: ranking[n]).index(n) for n in ("C streaming", "C beta .7 .3 0"))
        return ranks[0] == 0 and ranks[1] <= 2

    order = ", ".join(f"{name} {spread(errors[name])}" for name in sorted(means, key=lambda n: means[n]))
    enough = sum(map(holds, by_seed)) >= 2 / 3 * len(by_seed)
    verdict: Verdict = "reproduced" if holds(means) and enough else "partly" if holds(means) else "contradicted"
    return verdict, f"training error, lowest first: {order}"


def roughness(record: Record) -> float:
    """The standard deviation of the test loss's steps from epoch to epoch, while the learning rate is high."""
    curve = [number(line["test_loss"]) for line in record["metrics"][: math.ceil(record["run"]["epochs"] * 5 / 6)]]
    return math.nan if record["failed"] else unrest(curve)


def _c32(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for architecture in "CD":
        one, two = f"{architecture} streaming 64 x 1", f"{architecture} streaming"
        gap = below(final(records, two, "train_loss"), final(records, one, "train_loss"))
        rough = below(*([roughness(r) for r in records[name]] for name in (two, one)))
        parts += [judge(gap, -0.01, sign_alone_is_partly=False), judge(rough, 0, sign_alone_is_partly=False)]
        figures.append(f"{architecture}: training loss less by {spread(gap)} nats, roughness by {spread(rough)}")
    return together(parts), "; ".join(figures)


def change(record: Record) -> float:
    """How far the test loss moves with more loops than trained, the mean over them, in nats."""
    if record["failed"]:
        return math.nan
    trained, *longer = (number(loss) for _, loss in record["along"])
    return mean([abs(loss - trained) for loss in longer]) if math.isfinite(trained) else math.inf


def _c34(records: Records) -> tuple[Verdict, str]:
    figures, parts = [], []
    for architecture in "CD":
        changes = {arm: [change(r) for r in records[f"{architecture} {arm}"]] for arm in ("streaming", "tsbn")}
        parts.append(judge(below(changes["streaming"], changes["tsbn"]), 0))
        figures += [f"{architecture} {arm} {spread(values)}" for arm, values in changes.items()]
    return together(parts), "test loss moves by (nats): " + ", ".join(figures)


def _c35(records: Records) -> tuple[Verdict, str]:
    saved, latest = final(records, "C streaming"), final(records, "C streaming latest")
    noise = max(0.01, deviation(saved))
    gap = below(saved, latest)
    verdict: Verdict = "reproduced" if abs(mean(gap)) <= noise else "contradicted"
    return verdict, f"test error latest above saved by {spread(gap)}, noise {noise:.4f}"


CLAIMS = [
    Claim("C-19", "SN performs like TSBN on D, without statistics per time step (Figure 8).", _c19),
    Claim("C-20", "SN clearly outperforms the other methods in training (Figure 9).", _c20),
    Claim("C-21", "SN converges more than twice as fast as LN (Figure 9).", _c21),
    Claim("C-22", "Original BN trains and fails in testing (Figure 9).", _c22),
    Claim("C-23", "Time-specific BN works (Figure 9).", _c23),
    Claim("C-24", "32 S/B x 2 B/U and 64 x 1 are the same to LN (Figure 9).", _c24),
    Claim("C-25", "Ignoring the gradients of the statistics hurts (Figure 10).", _c25),
    Claim("C-26", "Those of the weight update before work reasonably well (Figure 10).", _c26),
    Claim("C-27", "(.7, .3, 0) or (.7, 0, .3) is best (Figure 10).", _c27),
    Claim("C-32", "Two batches an update help recurrent SN (sections 2 and 4.3, Figure 8).", _c32),
    Claim("C-34", "TSBN may not generalize to lengths it has not seen, SN does (Table 1).", _c34),
    Claim("C-35", "That statistics have moved on going back causes no problem (section 4.3).", _c35),
]


# --- The record


def write_results(records: Records, out: Path, title: str) -> Path:
    """``results.md`` with the verdict on every claim and a table for each figure; beside it ``results.json`` and
    ``curves.png``."""
    checkpoint.write(out / "results.json", json.dumps({"title": title, "records": records}, indent=1) + "\n")
    figures = {figure: {name: records[name] for name in names} for figure, names in FIGURES.items()}
    checkpoint.write(out / "curves.png", picture(figures))
    lines = [*opening(records["C streaming"][0], title), *verdicts(records, CLAIMS), ""]
    for figure, named in figures.items():
        lines += [f"## {figure}", "", table(summarize([r for seeds in named.values() for r in seeds]))]
    checkpoint.write(out / "results.md", "\n".join([*lines, "![Curves](curves.png)", ""]))
    return out / "results.md"


def main(arguments: Arguments) -> Path:
    """Train what is missing, check the claims, write the record."""
    tier, out = begin(arguments, "unrolled", TIERS)
    data = load(tier.data, arguments.data_root, train_limit=tier.train_limit, test_limit=tier.test_limit)
    records = carry_out(runs(tier), arguments.seeds_or(), data, out)
    examine(records, data, out)
    return write_results(records, out, f"Unrolled networks: {data.name}, tier {arguments.tier}")

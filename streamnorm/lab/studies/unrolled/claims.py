"""What the paper says about unrolled networks, checked on the records of ``unrolled``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    alike,
    below,
    deviation,
    final,
    first_at,
    judge,
    mean,
    number,
    spread,
    together,
    unrest,
)
from streamnorm.lab.studies.unrolled.runs import BETAS, FIGURES, SLOWER, mean_gradient


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

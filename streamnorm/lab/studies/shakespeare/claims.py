"""The paper's claims on recurrent networks that predict characters, checked on the records of ``shakespeare``.

Losses are in nats per character. A check names the runs it looks at and never trains; ``shakespeare.runs`` says what
the names mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from streamnorm.lab.studies.shakespeare.runs import kept_by_steps
from streamnorm.lab.studies.study import (
    Claim,
    Record,
    Records,
    Verdict,
    below,
    deviation,
    final,
    first_at,
    judge,
    lowest,
    mean,
    number,
    spread,
    together,
    unrest,
)

OTHER_SETTINGS = ("beta 0 0 1", "alpha .3 .7")
"""Of streaming, beside the figures' beta = (.7, 0, .3) and alpha = kappa = (.7, .3)."""
RESET = ("rnn streaming, state reset", "rnn tsbn, state reset")
"""Runs whose chunks all begin with a state of 0."""


# --- What a record says


def lower(records: Records, name: str, than: str) -> list[float]:
    """How much lower the lowest validation loss of ``name`` is, seed by seed, in nats."""
    return below(*(lowest(records, of, "validation_loss") for of in (name, than)))


def reached(record: Record, level: float) -> float:
    """After how many characters the validation loss was first at ``level``, between validations by a straight line."""
    return first_at(((line["characters"], number(line["validation_loss"])) for line in record["metrics"]), level)


def faster(records: Records, name: str, than: str) -> list[float]:
    """For each seed, how many times as fast ``name`` reached the losses that ``than`` had at quarters of its training
    (the median of those that are finite), less 1."""
    gains = []
    for record, other in zip(records[name], records[than], strict=True):
        lines = other["metrics"]
        if record["failed"] or other["failed"] or not lines:
            gains.append(math.nan)
            continue
        levels = [number(lines[max(0, len(lines) * k // 4 - 1)]["validation_loss"]) for k in (1, 2, 3, 4)]
        times = [reached(other, level) / reached(record, level) for level in levels if math.isfinite(level)]
        gains.append(statistics.median(times) - 1 if times else math.nan)
    return gains


def roughness(record: Record) -> float:
    """The standard deviation of the steps of the validation loss in the second third, where the rate is still high."""
    curve = [number(line["validation_loss"]) for line in record["metrics"]]
    return math.nan if record["failed"] else unrest(curve[len(curve) // 3 : len(curve) * 2 // 3 + 1])


def rise(record: Record) -> float:
    """How much more a character costs beyond the trained time steps than in the second half of them, in nats; inf where
    one of these losses is not finite."""
    if record["failed"]:
        return math.nan
    steps = max(record["run"]["steps"])
    within, beyond = record["along"][steps // 2 : steps], record["along"][steps:]
    return math.inf if None in (*within, *beyond) else mean(beyond) - mean(within)


def _times(gain: Sequence[float]) -> str:
    return spread([g + 1 for g in gain])


def _with_other_settings(records: Records, arch: str, than: str) -> str:
    """How streaming fares beside ``than`` with other settings than the figures'; no part of a verdict."""
    named = {other: f"{arch} streaming, {other}" for other in OTHER_SETTINGS}
    gaps = {other: lower(records, name, f"{arch} {than}") for other, name in named.items() if name in records}
    return "; with " + ", ".join(f"{other} below {than} by {spread(gap)}" for other, gap in gaps.items())


# --- The checks


def _c28(records: Records) -> tuple[Verdict, str]:
    gains = {arm: faster(records, f"rnn {arm}", "rnn layer") for arm in ("tsbn", "streaming")}
    others = {
        f"streaming, {o}": faster(records, f"rnn streaming, {o}", "rnn layer")
        for o in OTHER_SETTINGS
        if f"rnn streaming, {o}" in records
    }
    figures = ", ".join(f"{arm} {_times(gain)}" for arm, gain in (gains | others).items())
    return together([judge(gain, 0) for gain in gains.values()]), f"times as fast as layer: {figures}"


def _c29(records: Records) -> tuple[Verdict, str]:
    gaps = {arm: lower(records, "rnn streaming", f"rnn {arm}") for arm in ("tsbn", "layer")}
    figures = ", ".join(f"below {arm} by {spread(gap)}" for arm, gap in gaps.items())
    verdict = together([judge(gap, 0) for gap in gaps.values()])
    return verdict, f"nats: streaming {figures}{_with_other_settings(records, 'rnn', 'layer')}"


def _c30(records: Records) -> tuple[Verdict, str]:
    gain, gap = faster(records, "gru streaming", "gru layer"), lower(records, "gru streaming", "gru tsbn")
    named = {other: f"gru streaming, {other}" for other in OTHER_SETTINGS}
    others = "".join(
        f", with {other} {_times(faster(records, name, 'gru layer'))}"
        for other, name in named.items()
        if name in records
    )
    figures = f"times as fast as layer: {_times(gain)}{others}; nats: below tsbn by {spread(gap)}"
    figures += _with_other_settings(records, "gru", "tsbn")
    tsbn, layer, streaming = (f"gru {arm}, weights x 5" for arm in ("tsbn", "layer", "streaming"))
    if streaming in records:
        below_layer, below_tsbn = (spread(lower(records, streaming, other)) for other in (layer, tsbn))
        figures += (
            f"; with first weights x 5 {_times(faster(records, streaming, layer))} times as fast as layer, "
            f"below it by {below_layer} nats and below tsbn by {below_tsbn}"
        )
    return together([judge(gain, 0), judge(gap, 0)]), figures


def _c32(records: Records) -> tuple[Verdict, str]:
    one, two = "rnn streaming, 1 B/U", "rnn streaming"
    gap = lower(records, two, one)
    rough = below(*([roughness(r) for r in records[name]] for name in (two, one)))
    verdict = together([judge(gap, -0.01, sign_alone_is_partly=False), judge(rough, 0, sign_alone_is_partly=False)])
    return verdict, f"2 B/U below 1 B/U by {spread(gap)} nats; deviation of the curve's steps less by {spread(rough)}"


def _c33(records: Records) -> tuple[Verdict, str]:
    gaps = {
        arm: lower(records, f"rnn {arm}, mixed lengths, 3 B/U", f"rnn {arm}, mixed lengths, 1 B/U")
        for arm in ("streaming", "layer")
    }
    figures = ", ".join(f"{arm} {spread(gap)}" for arm, gap in gaps.items())
    steps = records["rnn layer, mixed lengths, 3 B/U"][0]["run"]["steps"]
    verdict = together([judge(gap, 0) for gap in gaps.values()])
    return verdict, f"3 B/U below 1 B/U on {', '.join(map(str, steps))} steps, nats: {figures}"


def _c34(records: Records) -> tuple[Verdict, str]:
    figures, verdicts = [], []
    for suffix in ("", ", state reset"):
        rises = {arm: [rise(r) for r in records[f"rnn {arm}{suffix}"]] for arm in ("streaming", "tsbn")}
        pairs = zip(rises["streaming"], rises["tsbn"], strict=True)
        verdicts.append(judge([abs(b) - abs(a) for a, b in pairs], 0))  # a loss that falls has changed, too
        figures += [f"{arm}{suffix} {spread(values)}" for arm, values in rises.items()]
    return together(verdicts), "rise beyond the trained steps, nats: " + ", ".join(figures)


def _c35(records: Records) -> tuple[Verdict, str]:
    gap = lower(records, "rnn streaming, latest statistics back", "rnn streaming")
    own = lowest(records, "rnn streaming", "validation_loss")
    noise = max(0.01, deviation(own))
    close = abs(mean(gap)) <= noise
    return ("reproduced" if close else "contradicted"), f"latest below saved by {spread(gap)} nats, noise {noise:.4f}"


def learned(record: Record) -> bool:
    """Whether every validation was finite and the last loss below the first."""
    curve = [number(line["validation_loss"]) for line in record["metrics"]]
    return not record["failed"] and math.inf not in curve and curve[-1] < curve[0]


def _c37(records: Records) -> tuple[Verdict, str]:
    able, figures = [], []
    for arch in ("rnn", "gru"):
        name = f"{arch} streaming, ReLU"
        able.append(all(map(learned, records[name])))
        ends, gap = final(records, name, "validation_loss"), lower(records, name, f"{arch} streaming")
        said = f"{arch} last {spread(ends)}, lowest below that of tanh by {spread(gap)}"
        endless = sum(any(line["validation_loss"] is None for line in r["metrics"]) for r in records[name])
        figures.append(said + f", {endless} of {len(ends)} seeds with a validation not finite" * bool(endless))
    verdict: Verdict = "reproduced" if all(able) else "partly" if any(able) else "contradicted"
    return verdict, f"validation loss, nats: {'; '.join(figures)}"


def _c59(records: Records) -> tuple[Verdict, str]:
    whole = [r for r in records["rnn streaming, state reset"] if not r["failed"]]
    drifts = [[number(d) / r["noise"] for d in r["drift"]] for r in whole]
    if not drifts:
        return "contradicted", "streaming could not train"
    farthest, steps = [max(of) for of in drifts], [sum(d > 2 for d in of) for of in drifts]
    visible: Verdict = "reproduced" if min(farthest) > 2 else "contradicted"
    gaps = {s: lower(records, f"rnn streaming{s}", f"rnn tsbn{s}") for s in (", state reset", "")}
    figures = ", ".join(f"streaming{s} below tsbn{s} by {spread(gap)} nats" for s, gap in gaps.items())
    as_well = judge(gaps[", state reset"], -0.02, sign_alone_is_partly=False)
    moved = (
        f"means of a step stray up to {spread(farthest)} times as far as by chance, at {steps} steps more than twice"
    )
    return together([visible, as_well]), f"{moved}; {figures}"


def _c61(records: Records) -> tuple[Verdict, str]:
    kept = {arm: kept_by_steps(records[f"rnn {arm}"][0]) for arm in ("streaming", "tsbn")}
    constant = len(set(kept["streaming"].values())) == 1
    (short, few), (long, many) = kept["tsbn"].items()
    verdict: Verdict = "reproduced" if constant and many * short == few * long else "contradicted"
    return verdict, "numbers kept by time steps: " + ", ".join(f"{arm} {of}" for arm, of in kept.items())


def _c66(records: Records) -> tuple[Verdict, str]:
    pairs = [(f"{name}, vertical", name) for name in ("rnn batch", "rnn streaming", "gru streaming")]
    figures = ", ".join(f"{name} {spread(lower(records, name, full))}" for name, full in pairs)
    return "reported", f"below the same with both paths normalized, nats: {figures}"


CLAIMS = [
    Claim("C-28", "RNN: TSNB and SN converge faster than LN (Figure 11).", _c28),
    Claim("C-29", "RNN: SN reaches a slightly lower loss than TSNB and LN (Figure 11).", _c29),
    Claim("C-30", "GRU: SN converges faster than LN and reaches a lower loss than TSNB (Figure 12).", _c30),
    Claim("C-32", "Two batches an update help recurrent SN (sections 2 and 4.3).", _c32, ("rnn streaming, 1 B/U",)),
    Claim(
        "C-33",
        "Mini-batches of different lengths in one update help where lengths vary (section 2).",
        _c33,
        tuple(f"rnn {arm}, mixed lengths, {n} B/U" for arm in ("streaming", "layer") for n in (1, 3)),
    ),
    Claim("C-34", "TSNB may not generalize to lengths it has not seen, SN does (Table 1).", _c34, RESET),
    Claim(
        "C-35",
        "That statistics have moved on going back causes no problem (section 4.3).",
        _c35,
        ("rnn streaming, latest statistics back",),
    ),
    Claim("C-37", "ReLU also works in the cells (section 5).", _c37, ("rnn streaming, ReLU", "gru streaming, ReLU")),
    Claim("C-59", "SN without statistics per time step works although they drift (section 8).", _c59, RESET),
    Claim("C-61", "SN keeps one set of statistics, TSNB one per time step (section 4.3).", _c61),
    Claim(
        "C-66",
        "Normalizing the input path alone, as earlier work did, beside both paths (section 6).",
        _c66,
        ("rnn batch", *(f"{name}, vertical" for name in ("rnn batch", "rnn streaming", "gru streaming"))),
    ),
]

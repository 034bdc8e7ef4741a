"""What seeds 000, 001 and 003 say about auto-encoders, checked on the records of ``autoencoder``."""

from __future__ import annotations

import math

from streamnorm.lab.studies.autoencoder.measures import NEIGHBORS
from streamnorm.lab.studies.autoencoder.runs import DROPOUTS
from streamnorm.lab.studies.study import (
    Claim,
    Records,
    Verdict,
    below,
    final,
    judge,
    lowest,
    mean,
    number,
    spread,
    together,
)


def figure(records: Records, name: str, key: str) -> list[float]:
    """What ``examined`` found for each seed; nan for a run that failed."""
    return [number(r.get(key, math.nan)) for r in records[name]]


def pairs_of(records: Records) -> dict[str, tuple[str, str]]:
    """Every learning rate and kind of mini-batch at which there are both arms of seed 000: without a norm, layer."""
    found = {
        name.removeprefix("none "): name for name in records if name.startswith("none ") and " dropout" not in name
    }
    return {what: (name, f"layer {what}") for what, name in found.items() if f"layer {what}" in records}


def ratios(records: Records, none: str, layer: str, key: str = "train_cost") -> list[float]:
    """Layer over none at each epoch, the means over the seeds."""
    both = []
    for name in (none, layer):
        if any(r["failed"] for r in records[name]):
            return [math.nan]
        both.append(
            [mean(column) for column in zip(*([m[key] for m in r["metrics"]] for r in records[name]), strict=True)]
        )
    return [b / a for a, b in zip(*both, strict=True)]


def _c38(records: Records) -> tuple[Verdict, str]:
    found = {what: ratios(records, *names) for what, names in pairs_of(records).items()}
    online = {what: both for what, both in found.items() if what.startswith("online")}
    strong = all(ratio <= 0.75 for both in online.values() for ratio in both)
    weak = any(all(ratio < 1 for ratio in both) for both in online.values())
    ends = [[mean(final(records, pairs_of(records)[what][i], "train_cost")) for what in online] for i in (0, 1)]
    best = [min((end for end in own if end == end), default=math.nan) for own in ends]  # a run that failed is nan
    figures = "; ".join(f"{what} " + ", ".join(f"{ratio:.3f}" for ratio in both) for what, both in found.items())
    figures += f"; online, each at its best rate {best[1] / best[0]:.3f}"
    return ("reproduced" if strong else "partly" if weak else "contradicted"), f"layer / none by epoch: {figures}"


def _c39(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for what, (none, layer) in pairs_of(records).items():
        if not what.startswith("online"):
            continue
        ends = {name: final(records, name, "norm") for name in (none, layer)}
        begins = {n: [r["metrics"][0]["norm"] if r["metrics"] else math.nan for r in records[n]] for n in ends}
        growth = {n: below(begins[n], ends[n]) for n in ends}
        parts += [judge(below(ends[none], ends[layer]), 0), judge(below(growth[none], growth[layer]), 0)]
        figures.append(
            f"{what}: none {spread(ends[none])}, grown by {spread(growth[none])} since the first epoch, "
            f"layer {spread(ends[layer])}, by {spread(growth[layer])}"
        )
    return together(parts), "; ".join(figures)


def _c40(records: Records) -> tuple[Verdict, str]:
    gaps = {
        w: below(figure(records, a, "precision"), figure(records, b, "precision"))
        for w, (a, b) in pairs_of(records).items()
    }
    names = [name for pair in pairs_of(records).values() for name in pair]
    figures = ", ".join(f"{name} {spread(figure(records, name, 'precision'))}" for name in names)
    return together([judge(gap, 0) for gap in gaps.values()]), f"precision at {NEIGHBORS}: {figures}"


def _c41(records: Records) -> tuple[Verdict, str]:
    refused = all(r["failed"] for r in records["batch online"])
    known = records["batch online"][0]["frequencies"]
    learned = [n for n in records if (" online" in n and not n.startswith(("batch", "none"))) or " in cycles" in n]
    able = [all(cost < known for cost in final(records, name, "test_cost")) for name in learned]
    figures = ", ".join(f"{name} {spread(final(records, name, 'test_cost'))}" for name in learned)
    verdict: Verdict = "reproduced" if refused and all(able) else "partly" if refused and any(able) else "contradicted"
    return verdict, f"batch {'refused' if refused else 'ran'}; test cost, {known:.2f} from frequencies: {figures}"


def _c46(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for depth in ("", "deep "):
        none, batch = f"{depth}sigmoid none", f"{depth}sigmoid batch"
        open_ = {name: figure(records, name, "unsaturated") for name in (none, batch)}
        ends = {name: final(records, name, "test_cost") for name in (none, batch)}
        parts += [judge(below(open_[none], open_[batch]), 0), judge(below(ends[batch], ends[none]), 0)]
        figures += [f"{n}: {spread(open_[n])} between .05 and .95, test cost {spread(ends[n])}" for n in (none, batch)]
    return together(parts), "; ".join(figures)


def _c47(records: Records) -> tuple[Verdict, str]:
    found = [r["bias"] for r in records["batch in batches"] if not r["failed"]]
    if not found:
        return "contradicted", "no seed could train"
    gradient, difference = (max(pair[i] for pair in found) for i in (0, 1))
    redundant = gradient <= 1e-7 and difference <= 1e-7
    figures = f"largest gradient of the bias {gradient:.1e}, largest difference of a logit {difference:.1e}, in float64"
    return ("reproduced" if redundant else "contradicted"), figures


def _c48_dropout(records: Records) -> tuple[Verdict, str]:
    best, figures = {}, []
    for arm in ("none", "batch"):
        costs = {x: lowest(records, f"{arm}, dropout {x}", "test_cost") for x in DROPOUTS}
        dropped = zip(*(costs[x] for x in DROPOUTS[1:]), strict=True)
        best[arm] = below([min((c for c in seeds if c == c), default=math.nan) for seeds in dropped], costs[0.0])
        ends = {x: mean(final(records, f"{arm}, dropout {x}", "test_cost")) for x in DROPOUTS}
        parts = (f"{x} {spread(cost)} (last {ends[x]:.2f})" for x, cost in costs.items())
        figures.append(f"{arm}: " + ", ".join(parts))
    figures += [f"dropout gains {arm} {spread(gain)}" for arm, gain in best.items()]
    return judge(below(best["batch"], best["none"]), 0), "lowest test cost by dropout, " + "; ".join(figures)


def _c48_place(records: Records) -> tuple[Verdict, str]:
    places = {"none": "none, dropout 0.0", "hidden": "batch, dropout 0.0", "top": "batch on top", "all": "batch on all"}
    costs = {place: lowest(records, name, "test_cost") for place, name in places.items()}
    figures = ", ".join(f"{place} {spread(cost)}" for place, cost in costs.items())
    return judge(below(costs["all"], costs["hidden"]), 0), f"lowest test cost with BN on {figures}"


def _c63(records: Records) -> tuple[Verdict, str]:
    parts, figures = [], []
    for what, names in pairs_of(records).items():
        if not what.startswith("online"):
            continue
        for key in ("units_alike", "units_and_words"):
            none, layer = (figure(records, name, key) for name in names)
            parts.append(judge(below(layer, none), 0))
        for name in names:
            alike, words, dead = (figure(records, name, key) for key in ("units_alike", "units_and_words", "dead"))
            figures.append(f"{name}: among units {spread(alike)}, with words {spread(words)}, dead {mean(dead):.1%}")
    return together(parts), "mean absolute correlation, " + "; ".join(figures)


CLAIMS = [
    Claim("C-38", "LN lowers the cost to 3/4 or less, at both epochs and the same rate (000).", _c38),
    Claim("C-39", "With LN the norm of W is larger and grows more (000).", _c39),
    Claim("C-40", "Neighbors by LN's codes are as good as those without (000).", _c40),
    Claim("C-41", "BN cannot learn from one document at a time; LN and streaming can (000, 001).", _c41),
    Claim("C-46", "With BN, sigmoid units saturate less and learn more of binary data (003).", _c46),
    Claim("C-47", "A bias before BN is redundant (003).", _c47),
    Claim(
        "C-48, 1", "Dropout gains less with BN than without, in an auto-encoder too (003, question 1).", _c48_dropout
    ),
    Claim("C-48, 2", "BN on all layers is better than on the hidden ones alone (003, question 2).", _c48_place),
    Claim("C-63", "ReLU units without a norm correlate more, with each other and with the words (000).", _c63),
]
"""Of a question, "reproduced" means yes."""

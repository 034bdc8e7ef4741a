"""A network that learns from a stream: every row is predicted, then learned, with a weight update for each.

Two times [linear without bias, norm, ReLU], then a linear read-out. A run is kept as one JSON file, and one that is
there is never done again. Where ``OnlineTrainer`` serves the layers and the optimizer, its compiled steps do the work;
an ordinary loop takes their place where it does not, for the first rows of a stream alone where a tier says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from streamnorm.definition.operation import Scale
from streamnorm.definition.ref import SP2
from streamnorm.definition.stats import Lp
from streamnorm.lab.runs.checkpoint import write
from streamnorm.lab.runs.classifier.run import Described
from streamnorm.lab.runs.keeping import finite
from streamnorm.lab.runs.underway import machine, versions
from streamnorm.lab.studies.sidebyside import each_once
from streamnorm.lab.studies.streams import data as streamdata
from streamnorm.lab.studies.streams.data import DRIFT, GENERATED, STREAMS, Stream
from streamnorm.nn.layers import StreamingNorm
from streamnorm.nn.norm import Norm
from streamnorm.nn.rivals import OnlineNorm
from streamnorm.reading import ReadError, parsed
from streamnorm.stream.policy import Sample
from streamnorm.train.online.trainer import OnlineTrainer

UNITS = 64
STEP = 50
"""Rows between two numbers of a record."""

NormFactory = Callable[[int], nn.Module]


PAPER = {"alpha": (0.7, 0.3), "beta": (0.7, 0.3, 0.0)}
KNOWN: dict[str, NormFactory | None] = {
    "none": nn.Identity,
    "layer": nn.LayerNorm,
    "rms": lambda c: Norm(c, SP2, Lp(2, "zero"), Sample(), affine=True, op=Scale()),
    "paper": lambda c: StreamingNorm(c, **PAPER),
    "p=1 about 0": lambda c: StreamingNorm(c, p=1, center="zero", **PAPER),
    "batch renormalization": None,  # refuses one sample a call: what it hands on is 0
    "online normalization": OnlineNorm,
    "default": StreamingNorm,
}
ARMS: dict[str, NormFactory] = {name: factory for name, factory in KNOWN.items() if factory is not None}
LEFT_OUT = tuple(name for name in KNOWN if name not in ARMS)
"""Arms that cannot learn from one sample at a time."""
OPTIMIZERS: dict[str, type[Optimizer]] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
RATES = {"SGD": (0.003, 0.01, 0.03, 0.1), "Adam": (0.0003, 0.001, 0.003)}
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"raw": lambda x: x, "standardized": streamdata.standardized}


@dataclass(frozen=True)
class StreamRun(Described):
    """One network on one stream.

    Attributes:
        stream: its name.
        features: raw, or standardized as they come.
        arm: one of ``ARMS``.
        optimizer: SGD or Adam.
        rate: of learning.
        seed: of the weights, and of the rows of a generator.
        rows: learn from so many rows only, the first; None: from all.
    """

    KIND = "a run on a stream of this version"

    stream: str
    features: str
    arm: str
    optimizer: str
    rate: float
    seed: int = 0
    rows: int | None = None

    @property
    def name(self) -> str:
        """What a record calls this run, whatever its seed.

        >>> StreamRun("Elec2", "raw", "layer", "SGD", 0.01, seed=3).name
        'Elec2, raw, layer, SGD 0.01'
        """
        return name_of(self.stream, self.features, self.arm, self.optimizer, self.rate)


def name_of(stream: str, features: str, arm: str, optimizer: str, rate: float) -> str:
    """The name of the runs of one cell of the study."""
    return f"{stream}, {features}, {arm}, {optimizer} {rate:g}"


def network(arm: str, inputs: int, classes: int, seed: int) -> nn.Sequential:
    """The network of an arm. With one seed all arms begin with the same weights; ``none`` has biases in the place of
    those of its norms, which begin as theirs at 0."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before in (inputs, UNITS):
            linear = nn.Linear(before, UNITS, bias=False)
            if arm == "none":
                linear.bias = nn.Parameter(torch.zeros(UNITS))
            layers += [linear] if arm == "none" else [linear, ARMS[arm](UNITS)]
            layers.append(nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(UNITS, classes))


@cache
def is_compiled(arm: str, optimizer: str) -> bool:
    """Whether ``OnlineTrainer`` serves the layers of an arm with an optimizer."""
    model = network(arm, 2, 2, 0)
    try:
        OnlineTrainer(model, OPTIMIZERS[optimizer](model.parameters(), lr=0.01))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


Steps = Callable[[Tensor, Tensor], Tensor]


def learn(run: StreamRun, stream: Stream) -> dict[str, Any]:
    """Predict and learn row after row; the record of it.

    A network whose output is not finite has diverged. It is wrong about that row and about all that follow.
    """
    x, y = FEATURES[run.features](stream.x)[: run.rows], stream.y[: run.rows]
    model = network(run.arm, x.shape[1], stream.classes, run.seed)
    optimizer = OPTIMIZERS[run.optimizer](model.parameters(), lr=run.rate)  # type: ignore[call-arg]
    compiled = is_compiled(run.arm, run.optimizer)
    if compiled:
        online = OnlineTrainer(model, optimizer)  # type: ignore[arg-type]
        steps: Steps = lambda a, b: online.steps(a, b)[1]  # noqa: E731
    else:
        steps = partial(_in_a_loop, model, optimizer)
    right, diverged, start = [], None, time.perf_counter()
    for first in range(0, len(x), STEP):
        few, labels = x[first : first + STEP], y[first : first + STEP]
        try:
            outputs = steps(few, labels) if diverged is None else None
        except OverflowError:  # its weights are lost
            outputs, diverged = None, first
        if outputs is not None:
            correct = outputs.argmax(1) == labels
            if not (sound := outputs.isfinite().all(1)).all():
                lost = int(sound.int().argmin())
                diverged = first + lost
                correct[lost:] = False
            right.append(int(correct.sum()))
        else:
            right.append(0)
    return {
        **run.to_json(),
        "label": run.name,
        "learned": len(x),
        "of": len(stream),
        "right": right,
        "diverged": diverged,
        "drift": stream.drift,
        "source": stream.source,
        "seconds": round(time.perf_counter() - start, 3),
        "by": "compiled steps" if compiled else "a loop",
        "versions": versions(),
        "machine": machine(),
    }


def _in_a_loop(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    outputs = []
    for row, label in zip(x.split(1), y.split(1), strict=True):
        output = model(row)
        F.cross_entropy(output, label).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(output.detach())
    return torch.cat(outputs)


# --- Many of them, kept


@dataclass(frozen=True)
class Source:
    """Where streams are from: the data folder, or made up with so many rows each."""

    data_root: Path | None = None
    made_up: int | None = None


@lru_cache(maxsize=32)
def _stream(name: str, source: Source, seed: int) -> Stream:
    if source.made_up:
        return streamdata.made_up(name, seed, source.made_up)
    return streamdata.load(name, source.data_root, seed)


def stream_of(run: StreamRun, source: Source) -> Stream:
    """The rows that a run learns from."""
    return _stream(run.stream, source, run.seed if run.stream in streamdata.GENERATORS else 0)


def path_of(run: StreamRun, out: Path) -> Path:
    """Where a run is kept."""
    cell = run.name.replace(", ", "/").replace(" ", "-")
    return out / "runs" / cell / f"seed{run.seed}-{run.rows or 'all'}-rows.json"


SHAPE = {
    **dict.fromkeys(("label", "source", "by"), str),
    **dict.fromkeys(("learned", "of"), range(1, 2**62)),
    "right": [range(STEP + 1), ...],
    "diverged": (int, None),
    "drift": (int, None),
    "seconds": float,
    "versions": {str: str},
    "machine": {str: (str, int)},
}
"""Of a record, beside the run."""


def kept(run: StreamRun, out: Path) -> dict[str, Any] | None:
    """The record of a run that is done.

    Raises:
        ReadError: if its file holds another run, or none.
    """
    path = path_of(run, out)
    if not path.exists():
        return None
    record, wrong = parsed(path.read_bytes(), {**run.to_json(), **SHAPE})
    if not wrong and len(record["right"]) != -(-record["learned"] // STEP):
        wrong = f"right does not count {record['learned']} rows"
    if wrong:
        raise ReadError(
            f"{path} does not hold the run {run.name}, seed {run.seed}; delete it to do that run again ({wrong})"
        )
    return record


def _do(job: tuple[StreamRun, Source, Path]) -> dict[str, Any]:
    run, source, out = job
    record = finite(learn(run, stream_of(run, source)))
    write(path_of(run, out), json.dumps(record) + "\n")
    return record


def carry_out(
    runs: Iterable[StreamRun],
    source: Source,
    out: Path,
    processes: int = 1,
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """Do every run that is not kept; for each name the records of its seeds, in their order."""

    def told(record: dict[str, Any]) -> str:
        lost = "" if record["diverged"] is None else f", diverged at row {record['diverged'] + 1}"
        return f"{accuracy(record):.4f}{lost}"

    jobs = [(run, source, out) for run in runs]
    return each_once(_do, jobs, lambda job: kept(job[0], out), told, processes, threads, say)


# --- What a record says


def accuracy(record: Mapping[str, Any], first: int | None = None, start: int = 0) -> float:
    """The share of the rows from ``start`` to ``first`` that were predicted right before they were learned; both are
    multiples of ``STEP``, or the end."""
    end = min(record["learned"], first or record["learned"])
    whole = end == record["learned"]
    if start % STEP or (end % STEP and not whole):
        raise ValueError(f"a record counts every {STEP} rows, got rows {start} to {end}")
    return sum(record["right"][start // STEP : None if whole else end // STEP]) / (end - start)


def common(records: Iterable[Sequence[Mapping[str, Any]]]) -> int:
    """The rows that all of several runs on one stream have learned from."""
    return min(record["learned"] for seeds in records for record in seeds)


def with_seeds(run: StreamRun, seeds: Iterable[int]) -> list[StreamRun]:
    """A run with each seed."""
    return [replace(run, seed=seed) for seed in seeds]


# --- All of the study

Rates = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Tier:
    """The size of a study.

    Attributes:
        streams: which.
        rows: learn from so many rows of a stream at most; None: from all.
        rates: of each optimizer.
        loop_rows: as rows, of what the ordinary loop alone serves.
        loop_features, loop_rates: its features and rates.
        seeds: of every run, unless others are asked for.
        many: seeds of the runs that look for one that diverges.
        window: rows before and after a drift.
        made_up: rows of each stream where they are made up.
    """

    streams: tuple[str, ...] = STREAMS
    rows: int | None = None
    rates: Rates = field(default_factory=lambda: RATES)
    loop_rows: int = DRIFT + 1000
    loop_features: tuple[str, ...] = ("raw",)
    loop_rates: Rates | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    many: int = 20
    window: int = 500
    made_up: int | None = None


TIERS = {
    "smoke": Tier(
        streams=("Elec2", "Bananas", "SEA"),
        rates={"SGD": (0.01, 0.1), "Adam": (0.001,)},
        loop_rows=200,
        loop_rates={"SGD": (0.1,)},
        seeds=(0,),
        many=2,
        window=50,
        made_up=200,
    ),
    "reduced": Tier(loop_rates={"SGD": (0.01, 0.03, 0.1)}),
    "full": Tier(loop_rows=GENERATED, loop_features=tuple(FEATURES)),
}


def runs(tier: Tier, seeds: Sequence[int]) -> list[StreamRun]:
    """Every run of the study, seed by seed, those that look for divergence left out."""
    return [replace(run, seed=seed) for seed in seeds for run in _cells(tier)]


def _cells(tier: Tier) -> list[StreamRun]:
    found = []
    for arm in ARMS:
        for optimizer, rates in tier.rates.items():
            fast = is_compiled(arm, optimizer)
            if not fast and tier.loop_rates is not None:
                rates = tier.loop_rates.get(optimizer, ())
            for stream in tier.streams:
                for features in FEATURES if fast else tier.loop_features:
                    rows = tier.rows if fast else tier.loop_rows
                    found += [StreamRun(stream, features, arm, optimizer, rate, rows=rows) for rate in rates]
    return found


def many_seeds(tier: Tier) -> list[StreamRun]:
    """The default at the highest rate of SGD with many seeds."""
    rows = tier.rows if is_compiled("default", "SGD") else tier.loop_rows
    rate = max(tier.rates["SGD"])
    cells = [StreamRun(stream, "raw", "default", "SGD", rate, rows=rows) for stream in ("Elec2", "Bananas")]
    return [run for cell in cells for run in with_seeds(cell, range(tier.many))]

"""What it costs that processes share statistics: collectives, bytes and time per weight update. Writes a record, in
JSON and in words, and a picture to ``benchmarks/results``.

    python benchmarks/scaling.py            # all of it, a few minutes on a quiet machine

The network has the shape of ResNet-18: 20 normalized layers. *Once an update* is what ``StreamingNorm`` does by itself
under ``DistributedDataParallel``; *in every layer* is what synchronized batch normalization needs at least: one
collective of ``2 c + 1`` numbers in each forward pass of a layer of c features, one of ``2 c`` in its backward pass,
float32. The model of time is that of a ring::

    t(p, b) = 2 (p - 1) alpha + 2 (p - 1) / p  b beta        p processes, b bytes
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import streamnorm as sn
from streamnorm.lab.bench.resnet import resnet
from streamnorm.lab.runs.underway import machine, versions
from streamnorm.nn.norm import norms
from streamnorm.nn.replicas import memories
from streamnorm.stream.merging import sent

SIZES = (2, 4, 8)
REPLICAS = tuple(2**k for k in range(3, 15))
PAYLOADS = tuple(8**k for k in range(1, 8))
"""Bytes of the collectives from which alpha and beta are taken."""
IMAGES, SIDE, CLASSES = 8, 64, 1000
CPU = ", CPU"
ONCE, LAYERS = "once an update", "in every layer"
EVERYWHERE = "nn.BatchNorm2d, collectives in every layer"
Times = dict[str, list[float]]


def plan() -> dict[str, list[int]]:
    """The bytes of each collective of a weight update."""
    streaming, plain = resnet(sn.StreamingNorm, CLASSES), resnet(nn.BatchNorm2d, CLASSES)
    rows = [sent(memory) for layer in norms(streaming) for memory in memories(layer)]
    widths = [layer.num_features for layer in plain.modules() if isinstance(layer, nn.BatchNorm2d)]
    return {
        ONCE: [8 * (sum(map(len, rows)) + 1)],
        LAYERS: [4 * n for c in widths for n in (2 * c + 1, 2 * c)],
    }


def seconds(size: int, payload: int, alpha: float, beta: float) -> float:
    """The model of a collective."""
    return 2 * (size - 1) * alpha + 2 * (size - 1) / size * payload * beta


def fitted(size: int, times: Times) -> tuple[float, float]:
    """alpha and beta with the least squares of relative errors."""
    rows, ones = [], []
    for payload in PAYLOADS:
        t = statistics.median(times[f"{payload} bytes"])
        rows.append([2 * (size - 1) / t, 2 * (size - 1) / size * payload / t])
        ones.append(1.0)
    alpha, beta = np.linalg.lstsq(np.array(rows), np.array(ones), rcond=None)[0]
    return float(alpha), float(beta)


# --- what each process does ---


def timed(subjects: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Seconds of each subject in each round, and, under its name and ``CPU``, those that the busiest process computed;
    all in turn, in an order that is drawn; the first round is left out. All begin together and wait for the last."""
    times: Times = {name + clock: [] for name in subjects for clock in ("", CPU)}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(subjects), len(subjects)):
            dist.barrier()
            start, computed = time.perf_counter(), time.process_time()
            subjects[name]()
            most = torch.tensor([time.perf_counter() - start, time.process_time() - computed], dtype=torch.float64)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            for clock, value in zip(("", CPU), most.tolist(), strict=True) if number else ():
                times[name + clock].append(value)
    return times


def collectives(rank: int, size: int, rounds: int) -> Times:
    """Collectives of several sizes, and those of each way."""

    def all_of(payloads: list[int]) -> Callable[[], Any]:
        values = [torch.zeros(payload, dtype=torch.uint8) for payload in payloads]
        return lambda: [dist.all_reduce(value) for value in values]

    subjects = {f"{payload} bytes": all_of([payload]) for payload in PAYLOADS}
    return timed(subjects | {name: all_of(payloads) for name, payloads in plan().items()}, rounds)


class InEveryLayer(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and the two collectives of synchronized statistics, whose results are not used: the least that
    any such layer takes."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.num_features
        dist.all_reduce(torch.zeros(2 * c + 1))
        y = super().forward(x)
        y.register_hook(lambda _: dist.all_reduce(torch.zeros(2 * c)))
        return y


def training(rank: int, size: int, rounds: int) -> Times:
    """Steps of training under ``DistributedDataParallel`` with each kind of layer."""

    def step_of(make: Callable[[int], nn.Module], sync: Any = "update") -> Callable[[], None]:
        torch.manual_seed(0)
        model = resnet(make, CLASSES)
        if sync == "batch":
            sn.synchronize(model, "batch")
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.01, 0.9)
        x, y = torch.randn(IMAGES, 3, SIDE, SIDE), torch.randint(CLASSES, (IMAGES,))

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()

        return step

    return timed(
        {
            "nn.BatchNorm2d": step_of(nn.BatchNorm2d),
            "StreamingNorm": step_of(sn.StreamingNorm),
            EVERYWHERE: step_of(InEveryLayer),
            'BatchNorm, sync="batch"': step_of(sn.BatchNorm, "batch"),
        },
        rounds,
    )


def _process(rank: int, size: int, folder: str, work: Callable[..., Times], rounds: int) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    times = work(rank, size, rounds)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def measured(size: int, work: Callable[..., Times], rounds: int) -> Times:
    """What ``work`` measures in so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "streamnorm"])
        mp.start_processes(_process, (size, folder, work, rounds), size, start_method="forkserver")
        return json.loads(Path(folder, "times.json").read_text())


# --- what is written ---


def ratio(times: Times, one: str, other: str) -> str:
    """The median over the rounds of a ratio in one round, and its quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[one], times[other], strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def spoken(t: float) -> str:
    """A time with its unit.

    >>> spoken(0.00123), spoken(2.5)
    ('1.23 ms', '2.50 s')
    """
    return f"{t:.2f} s" if t >= 1 else f"{1e3 * t:.2f} ms" if t >= 1e-3 else f"{1e6 * t:.1f} us"


def written(record: dict[str, Any]) -> str:
    """The record in words."""
    times, ways = record["collectives"], record["plan"]
    constants = {size: fitted(size, times[str(size)]) for size in SIZES}

    def model(size: int, way: str, of: int) -> float:
        return sum(seconds(size, payload, *constants[of]) for payload in ways[way])

    lines = [f"# Shared statistics, {record['date']}", ""]
    load = " and ".join(f"{value:.1f}" for value in record["load"])
    lines += [
        f"{record['machine']['cpu']}, {record['cores']} cores, gloo, one thread a process, torch "
        f"{record['versions']['torch']}; load average before and after {load}. Medians over {record['rounds']} rounds "
        f"of collectives and {record['steps']} of training, everything in turn in each round; in brackets quartiles.",
        "",
    ]
    lines += ["| per weight update | collectives | bytes |", "|---|---|---|"]
    lines += [f"| {way} | {len(payloads)} | {sum(payloads):,} |" for way, payloads in ways.items()]
    lines += ["", f"Constants, from single collectives of {PAYLOADS[0]} to {PAYLOADS[-1]:,} bytes, and times:"]
    lines += ["", "| processes | alpha | beta, ns per byte | way | measured | model | measured / model |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for size in SIZES:
        alpha, beta = constants[size]
        for way in ways:
            t, told = statistics.median(times[str(size)][way]), model(size, way, size)
            cells = size, spoken(alpha), f"{1e9 * beta:.2f}", way, spoken(t), spoken(told), f"{t / told:.2f}"
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| processes | once an update, of in every layer: measured | model |", "|---|---|---|"]
    for size in SIZES:
        share = ratio(times[str(size)], *ways)
        lines.append(f"| {size} | {share} | {model(size, ONCE, size) / model(size, LAYERS, size):.3f} |")
    lines += ["", "Extrapolated with the constants of two processes, which have a core each; not measured:", ""]
    lines += ["| processes | bytes sent by each | once an update | in every layer | of it |", "|---|---|---|---|---|"]
    for size in REPLICAS:
        one, other = (model(size, way, 2) for way in ways)
        sent_ = " and ".join(f"{2 * (size - 1) / size * sum(ways[way]):,.0f}" for way in ways)
        lines.append(f"| {size:,} | {sent_} | {spoken(one)} | {spoken(other)} | {one / other:.3f} |")
    step = record["training"]
    lines += [
        "",
        f"A step of training under DistributedDataParallel, 2 processes, {IMAGES} images of {SIDE} x {SIDE} each:",
    ]
    lines += [
        "",
        "| layers | median | of nn.BatchNorm2d | of collectives in every layer | CPU time of nn.BatchNorm2d's |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name in (name for name in step if not name.endswith(CPU)):
        ratios = [ratio(step, name, "nn.BatchNorm2d"), ratio(step, name, EVERYWHERE)]
        ratios.append(ratio(step, name + CPU, "nn.BatchNorm2d" + CPU))
        lines.append(f"| {name} | {spoken(statistics.median(step[name]))} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Time per weight update over the number of processes: the model, and what was measured."""
    from matplotlib.figure import Figure

    from streamnorm.drawing import COLORS

    figure = Figure((6, 3.6), layout="constrained")
    panel = figure.subplots()
    constants = fitted(2, record["collectives"]["2"])
    many = [2**k for k in range(1, int(math.log2(REPLICAS[-1])) + 1)]
    for (way, payloads), color in zip(record["plan"].items(), (COLORS["streaming"], COLORS["batch"]), strict=True):
        model = [sum(seconds(p, b, *constants) for b in payloads) for p in many]
        panel.plot(many, model, color=color, label=f"{way}: model of 2 processes")
        found = [statistics.median(record["collectives"][str(p)][way]) for p in SIZES]
        panel.plot(SIZES, found, "o", color=color, label=f"{way}: measured")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("processes")
    panel.set_title("Seconds per weight update for statistics", loc="left", size=10)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, then write."""
    parser = argparse.ArgumentParser(description="Time what it costs to share statistics.")
    parser.add_argument("--rounds", type=int, default=40, help="of collectives")
    parser.add_argument("--steps", type=int, default=15, help="rounds of training steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    wanted = parser.parse_args()
    before = os.getloadavg()[0]
    times = {str(size): measured(size, collectives, wanted.rounds) for size in SIZES}
    step = measured(2, training, wanted.steps)
    record = {
        "date": str(date.today()),
        "machine": machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "load": [before, os.getloadavg()[0]],
        "rounds": wanted.rounds,
        "steps": wanted.steps,
        "plan": plan(),
        "collectives": times,
        "training": step,
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    path = wanted.out / f"{record['date']}-scaling"
    path.with_suffix(".json").write_text(json.dumps(record) + "\n")
    path.with_suffix(".md").write_text(written(record))
    draw(record, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

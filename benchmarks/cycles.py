"""What a vectorized cycle costs beside ordinary batch normalization: time of a weight update over the same samples.

    python benchmarks/cycles.py [--rounds 15] [--updates 20] [--threads 2]

Variants of one architecture run interleaved in one process, in random order; a figure is the median over rounds of
(variant time / torch batch normalization's time in the same round). Before any timing, a vectorized cycle is compared
with the loop over its mini-batches, and no time is taken if they differ.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.training.architectures import Convolutional, FullyConnected
from streamnorm.training.data import Data
from streamnorm.training.loop import Trainer, machine, versions
from streamnorm.training.run import Run

Make = Callable[[int], nn.Module]


def a(norm: Make) -> nn.Module:
    return FullyConnected(3072, 10, norm, 256)


def b(norm: Make) -> nn.Module:
    return Convolutional(3, 10, norm, 16)


def dau(model: nn.Module, m: int, n: int, vectorize: bool = True) -> sn.DAU:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return sn.DAU(
        model, optimizer, F.cross_entropy, samples_per_batch=m, batches_per_update=n, vectorize=vectorize, warmup=0
    )


def gate(network: Callable[[Make], nn.Module], norm: Make, x: Tensor, y: Tensor) -> None:
    """A vectorized cycle equals the loop, or there is no timing."""
    torch.manual_seed(0)
    one = network(norm).double()
    two = copy.deepcopy(one)
    for model, vectorize in ((one, True), (two, False)):
        trainer = dau(model, 1, len(x), vectorize)
        trainer.warm_up(x.double())
        trainer.update(x.double(), y)
    worst = max(
        (p - q).abs().max().item() for p, q in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    assert worst < 1e-9, f"the vectorized cycle is off by {worst:.1e}"


def measure(
    title: str, network: Callable[[Make], nn.Module], shape: tuple[int, ...], size: int, args: argparse.Namespace
) -> None:
    x, y = torch.randn(size * args.updates, *shape), torch.randint(10, (size * args.updates,))
    torch_bn = nn.BatchNorm1d if network is a else nn.BatchNorm2d
    variants = {
        f"torch batch norm {size} x 1": dau(network(torch_bn), size, 1),
        f"torch layer norm {size} x 1": dau(
            network(lambda c: nn.LayerNorm(c) if network is a else nn.GroupNorm(1, c)), size, 1
        ),
        f"streamnorm batch {size} x 1": dau(network(sn.BatchNorm), size, 1),
        f"streaming {size} x 1": dau(network(sn.StreamingNorm), size, 1),
        f"streaming 1 x {size} vectorized": dau(network(sn.StreamingNorm), 1, size),
        f"streaming L1 1 x {size} vectorized": dau(network(lambda c: sn.StreamingNorm(c, p=1)), 1, size),
        f"streaming L1 about 0, 1 x {size} vectorized": dau(
            network(lambda c: sn.StreamingNorm(c, p=1, center="zero")), 1, size
        ),
        f"streaming 1 x {size} loop": dau(network(sn.StreamingNorm), 1, size, vectorize=False),
    }
    for norm in (sn.StreamingNorm, lambda c: sn.StreamingNorm(c, p=1, center="zero")):
        gate(network, norm, x[:8], y[:8])
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(args.rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            updates = args.updates if "loop" not in name else max(1, args.updates // 5)
            start = time.perf_counter()
            for u in range(updates):
                variants[name].update(x[u * size : (u + 1) * size], y[u * size : (u + 1) * size])
            if round_:
                times[name].append((time.perf_counter() - start) / updates)
    print(f"\n{title}\n\n| variant | ms an update | ratio, median | lowest | highest |\n|---|---|---|---|---|")
    base = times[f"torch batch norm {size} x 1"]
    for name, taken in times.items():
        ratios = [t / u for t, u in zip(taken, base, strict=True)]
        print(
            f"| {name} | {statistics.median(taken) * 1e3:.2f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} | {max(ratios):.2f} |"
        )


def epochs(args: argparse.Namespace) -> None:
    """A whole epoch of the training loop, with its access to the data and its metrics, its test of 640 samples too."""
    x, y = torch.randn(6400, 3072), torch.randint(10, (6400,))
    data = Data("noise", x, y, x[:640], y[:640], 10, "torch.randn")
    arms = {"torch batch norm 64 x 1": ("batch", 64, 1), "streaming 1 x 64 vectorized": ("streaming", 1, 64)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        for name in random.sample(list(arms), len(arms)):
            arm, m, n = arms[name]
            run = Run(arm=arm, width=256, samples_per_batch=m, batches_per_update=n, epochs=1, learning_rate=0.01)
            trainer = Trainer(run, data)
            if arm == "batch":
                trainer.model = a(nn.BatchNorm1d)
                trainer.dau = dau(trainer.model, m, n)
            start = time.perf_counter()
            while not trainer.finished:
                trainer.step()
            if round_:
                times[name].append(time.perf_counter() - start)
    ratios = [s / t for t, s in zip(*times.values(), strict=True)]
    print("\nAn epoch of the training loop, architecture A, 6,400 samples\n\n| variant | s an epoch |\n|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {statistics.median(taken):.3f} |")
    print(f"\nRatio, median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{versions()}, {machine()}; {args.rounds} rounds of {args.updates} updates")
    epochs(args)
    measure("Architecture A, 3 x 256, 64 samples an update", a, (3072,), 64, args)
    measure("Architecture B, 16 then 32 features, 32 images an update", b, (3, 32, 32), 32, args)


if __name__ == "__main__":
    main()

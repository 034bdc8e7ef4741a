"""Two processes that see different digits: apart each has statistics of its own, together they have the same."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from streamnorm import StreamingNorm, synchronize

PICTURE = Path(__file__).parents[2] / "docs/gallery/processes.png"
WAYS = {"each for itself": None, "merged at each update": "update"}


def train(rank: int, folder: str, updates: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    own = (y >= 5) == bool(rank)  # the first process sees 0 to 4, the second 5 to 9
    x, y, means = x[own].float() / 16, y[own], {}
    for way, sync in WAYS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32, bias=False), StreamingNorm(32), nn.ReLU(), nn.Linear(32, 10))
        synchronize(model, sync)
        both = DistributedDataParallel(model, broadcast_buffers=False)  # gradients alone
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        means[way] = []
        for index in torch.randint(len(x), (updates, 4), generator=torch.Generator().manual_seed(rank)):
            nn.functional.cross_entropy(both(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            means[way].append(model[1].H1.long[0].clone())
    torch.save({way: torch.stack(rows) for way, rows in means.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main(picture: Path = PICTURE, updates: int = 150) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (folder, updates), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
    figure = Figure(figsize=(8, 3), layout="constrained")
    apart = {way: (first[way] - second[way]).abs().max().item() for way in WAYS}
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for k, color in enumerate(("#0072b2", "#d55e00", "#009e73")):
            axes.plot(first[way][:, k], "-", second[way][:, k], "--", color=color, linewidth=1)
        axes.set(title=f"{way}: at most {apart[way]:.2g} apart", xlabel="weight update")
    figure.supylabel("remembered mean of three units", fontsize=9)
    figure.savefig(picture, dpi=110)
    print("statistics of two processes, largest distance:", ", ".join(f"{way} {d:.2g}" for way, d in apart.items()))
    return apart


if __name__ == "__main__":
    main()

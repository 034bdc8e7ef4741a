"""A NormRef of your own: each neuron is compared with the activations of its own half of the image.

``mean`` is all there is to write; sigma, the gradients and the stream follow from it.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn

from streamnorm import Lp, Norm, NormRef, Streaming


@dataclass(frozen=True, repr=False)
class Halves(NormRef):
    def mean(self, x):  # x (steps, samples, groups, features of a group, height, width)
        halves = []
        for half in x.tensor_split(2, dim=-1):
            own = half.mean((1, 3, 4, 5), keepdim=True)
            halves.append(own.expand(-1, -1, -1, -1, *half.shape[4:]))
        return torch.cat(halves, -1)


def main(epochs: int = 1) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    norm = Norm(16, Halves("own", "here", "batch"), Lp(2, "batch"), Streaming(), affine=True)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(1437).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    accuracy = (model.eval()(x[1437:]).argmax(1) == y[1437:]).float().mean().item()
    print(f"own reference: {accuracy:.1%} of 360 test digits right")
    return accuracy


if __name__ == "__main__":
    main()

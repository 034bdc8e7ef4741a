"""Streaming normalization in the place of batch normalization, in an ordinary training loop with tiny mini-batches.

One line differs from what one would write with nn.BatchNorm2d: the layer.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import streamnorm


def main(epochs: int = 2) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        streamnorm.StreamingNorm(16),  # was: nn.BatchNorm2d(16)
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(1437).split(2):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(x[1437:]).argmax(1) == y[1437:]).float().mean().item()
    print(f"two images a batch: {accuracy:.1%} of 360 test digits right")
    return accuracy


if __name__ == "__main__":
    main()

"""Learning from a stream: one sample at a time, a weight update every 16 samples, and every sample tested before it is
learnt from (prequential error): each of 1,797 scanned digits is seen once."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import streamnorm


def main(samples: int = 1797) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 64, bias=False), streamnorm.StreamingNorm(64, center="zero", p=1), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dau = streamnorm.DAU(
        model, optimizer, nn.functional.cross_entropy, samples_per_batch=1, batches_per_update=16, vectorize=False
    )
    wrong = 0
    order = torch.randperm(len(x))[:samples]
    for step, i in enumerate(order):
        _, output = dau.accumulate(x[i : i + 1], y[i : i + 1])
        if step >= samples // 2:
            wrong += int(output.argmax() != y[i])
    error = wrong / (samples - samples // 2)
    print(f"one sample at a time: {error:.1%} wrong before being learnt from, in the second half of {samples} samples")
    return error


if __name__ == "__main__":
    main()

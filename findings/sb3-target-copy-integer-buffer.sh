#!/usr/bin/env bash
# stable-baselines3 copies whatever is called running_ into target networks as if it were a fraction.
# Version: stable-baselines3 2.9.2, torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: DQN, TD3 and SAC copy the running statistics of batch normalization into their target networks, chosen by the name
#   "running_"; a module of one's own that follows torch's names gets the same.
# Instead: the copy is an average with weight 1.0 in place, target * (1 - 1.0) + source, which torch refuses for whole numbers. A
#   buffer running_count of int64 stops training at the first update of a target, after the buffers before it were copied. torch's own
#   counter is spared because it is called num_batches_tracked; it is not copied at all and stays 0.
# Matters: a streaming normalization has to keep its counts under another name, and must be able to test without them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch import nn
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update


class Standardize(nn.Module):
    """A running mean that counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.running_count += len(x)
            self.running_mean += (x - self.running_mean).sum(0) / self.running_count
        return x - self.running_mean


def copied(net, target):
    mine, theirs = (get_parameters_by_name(m, ["running_"]) for m in (net, target))
    polyak_update(mine, theirs, 1.0)  # as DQN, TD3 and SAC do at every update of their targets


torch.manual_seed(0)
x = torch.randn(5, 3) + 4
theirs, ours = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)], [Standardize(), Standardize()]
for net, target in (theirs, ours):
    net(x)
copied(*theirs)
print("torch's batch normalization: running mean copied", torch.equal(theirs[0].running_mean, theirs[1].running_mean),
      "counter", int(theirs[0].num_batches_tracked), "->", int(theirs[1].num_batches_tracked))
try:
    copied(*ours)
    raise SystemExit("the counter was copied")
except RuntimeError as error:
    print("running_count, whole numbers:", error)
    assert "can't be cast" in str(error)
print("running mean copied", torch.equal(ours[0].running_mean, ours[1].running_mean))
assert torch.equal(theirs[0].running_mean, theirs[1].running_mean) and int(theirs[1].num_batches_tracked) == 0
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

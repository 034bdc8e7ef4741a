#!/usr/bin/env bash
# An empty batch in training: torch's BatchNorm counts it without learning, InstanceNorm is NaN from then on.
# Version: torch 2.13.0, 2026-11-30.
#
# Guessed: a batch of no samples is accepted and changes nothing; a batch that is refused changes nothing either.
# Instead: BatchNorm1d leaves mean and variance alone but counts the batch, so with momentum=None the "average" is no longer one:
#   after 100 empty batches in front, ten batches of mean 5 make 0.45. A single sample is refused with a ValueError, and counted
#   as well. InstanceNorm1d with running statistics divides by zero: they are NaN for good, and so is all it gives in eval mode.
# Matters: a stream that is split by class, by expert or by time has empty and single batches, and the usual answer to the error
#   is to skip that batch.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch import nn


def learn(layer, front, shape):
    torch.manual_seed(0)
    for n in [front] * 100 if front is not None else []:
        try:
            layer(torch.randn(n, *shape))
        except ValueError:
            pass  # skipped
    for _ in range(10):
        layer(torch.randn(64, *shape) + 5)
    return layer.running_mean.mean().item(), int(layer.num_batches_tracked)


seen = {}
for name, front in (("nothing", None), ("100 empty batches", 0), ("100 refused samples", 1)):
    seen[name] = learn(nn.BatchNorm1d(2, momentum=None), front, (2,))
    print("BatchNorm1d, momentum None, %-19s then 10 batches of mean 5: running mean %.2f, counted %d" % (name, *seen[name]))
layer = nn.InstanceNorm1d(2, track_running_stats=True)
mean, _ = learn(layer, 0, (2, 8))
out = layer.eval()(torch.ones(1, 2, 8))
print(f"InstanceNorm1d, 100 empty batches, then 10 of mean 5: running mean {mean}, output in eval mode {out[0, 0, 0].item()}")
assert abs(seen["nothing"][0] - 5) < 0.1 and seen["nothing"][1] == 10
for name in ("100 empty batches", "100 refused samples"):
    assert seen[name][0] < 0.6 and seen[name][1] == 110
assert mean != mean and out.isnan().all()
PY
"$dir/venv/bin/python" "$dir/finding.py"

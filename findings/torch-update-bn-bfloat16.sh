#!/usr/bin/env bash
# In bfloat16 a running average of batch normalization leaves the right value again: 1000 batches of mean 3 average to 2.
# Version: torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: model.bfloat16() also casts the running statistics; they keep 8 bits, so a mean of 3 comes out within 0.02, or the
#   updates become too small to count and it stays where it is.
# Instead: with momentum=None, which update_bn sets, it is right after 100 batches and 2.0 after 1000, in every channel: each step
#   multiplies by 1 - 1/n and adds mean/n, and with 1 - 1/n rounded too the steps do not cancel, so the mean slides down to the
#   next power of two. With momentum=0.01 it stops at 2.03 on its way up from 0, and the variance, right at the start, goes down to
#   0.84. Statistics in float32 with values in bfloat16, as autocast has them, are right.
# Matters: more data make the average worse, and update_bn is run over all of the training data. Nothing is raised.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

torch.set_num_threads(1)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (torch.randn(256, 4, generator=generator) + 3).bfloat16()


seen = {}
for count in (100, 1000):
    for dtype in (torch.bfloat16, torch.float32):
        norm = nn.BatchNorm1d(4).to(dtype)
        update_bn(batches(count), norm)
        seen[count, dtype] = norm.running_mean.float(), norm.running_var.float()
        print(f"update_bn, {count:4} batches, statistics in {str(dtype)[6:]:8}: means {norm.running_mean.tolist()}")
for dtype in (torch.bfloat16, torch.float32):
    norm = nn.BatchNorm1d(4, momentum=0.01).to(dtype)
    for batch in batches(2000):
        norm(batch)
    seen[dtype] = norm.running_mean.float(), norm.running_var.float()
    mean, var = norm.running_mean.tolist(), norm.running_var.tolist()
    print(f"momentum 0.01, 2000 batches, in {str(dtype)[6:]:8}: means {mean} variances {var}")
for count in (100, 1000):
    assert (seen[count, torch.float32][0] - 3).abs().max() < 0.05
assert (seen[100, torch.bfloat16][0] - 3).abs().max() < 0.2
assert (seen[1000, torch.bfloat16][0] - 2).abs().max() < 0.1
mean, var = seen[torch.bfloat16]
assert (mean - 3).abs().min() > 0.8 and var.max() < 0.9
mean, var = seen[torch.float32]
assert (mean - 3).abs().max() < 0.05 and (var - 1).abs().max() < 0.05
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

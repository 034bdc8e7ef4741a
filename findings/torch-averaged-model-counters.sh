#!/usr/bin/env bash
# AveragedModel(use_buffers=True) averages batch normalization's counter of batches too, and it stays at 1.
# Version: torch 2.13.0, 2026-11-30. (timm 1.0.31's ModelEmaV3, tried by hand, copies the counter.)
#
# Guessed (as a careful user would; ours was only that something is rounded): after 1000 updates the averaged model's
#   num_batches_tracked is 1000 (a counter is copied) or about 500 (the mean of 1 to 1000).
# Instead: it is 1. The running mean adds (new - old) / (n + 1) each time, and in integers each of these steps is rounded down to 0.
#   With use_buffers=False it is 1000.
# Matters: with BatchNorm1d(momentum=None) the counter is the weight of all that was seen. The averaged model holds the statistics
#   of 1000 batches, and the next batch in training mode counts for half of them; in the source model it counts for 1/1001.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch.optim.swa_utils import AveragedModel

torch.manual_seed(0)
source = torch.nn.Sequential(torch.nn.BatchNorm1d(1, momentum=None))
models = {"averaged": AveragedModel(source, use_buffers=True), "copied": AveragedModel(source, use_buffers=False)}
for _ in range(1000):
    source(torch.randn(8, 1) + 10)
    for model in models.values():
        model.update_parameters(source)
odd = torch.randn(8, 1)  # a batch of mean 0 after a thousand of mean 10
seen = {}
for name, norm in (("averaged", models["averaged"].module[0]), ("copied", models["copied"].module[0]), ("source", source[0])):
    count, before = norm.num_batches_tracked.item(), norm.running_mean.item()
    norm.train()(odd)
    seen[name] = count, before, norm.running_mean.item()
    print("%-8s  batches counted %4d, running mean %.2f, and after one odd batch %.2f" % (name, *seen[name]))
assert models["averaged"].n_averaged.item() == 1000
assert all(abs(before - 10) < 0.2 for _, before, _ in seen.values())
assert seen["averaged"][0] == 1 and seen["averaged"][2] < 6
for name in ("copied", "source"):
    assert seen[name][0] == 1000 and seen[name][2] > 9.8
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# On the CPU, torch's GroupNorm and BatchNorm2d are wrong for float32 values with an offset if the tensor is in channels_last order.
# Version: torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: the memory format changes the order of the sums, so the last digits. And the more values a mean is taken over, the better
#   the mean.
# Instead, for values of deviation 1 around 3000 (on a contiguous tensor both layers are right to 0.001):
#   GroupNorm is off by hundreds. It looks like a variance taken as mean(x^2) - mean(x)^2: in some groups nothing of it is left but
#   eps. Around 300 its error is already more than 100 times that of the contiguous tensor.
#   BatchNorm2d is right on a few thousand values a channel and wrong on many: over 64 images of 64 x 64 even the MEAN is off by
#   several deviations, so the variance comes out far above 1. It looks like one plain float32 sum after another. Both go into
#   running_mean and running_var, and into the saved model. (More threads share the values, and the error is smaller: one here.)
# Matters: channels_last is advised for speed and changes neither shape nor dtype, so nobody suspects it; and a larger batch, the
#   usual remedy for poor statistics, makes it worse. Features with an offset are what one puts a normalization layer behind.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import copy

import torch

torch.manual_seed(0)
torch.set_num_threads(1)


def errors(layer, x):
    """The largest error of the output, contiguous and in channels_last, and what the two copies of the layer have learned."""
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, last)
    exact = copy.deepcopy(layer).double()(x.double())
    copies = copy.deepcopy(layer), copy.deepcopy(layer)
    found = [(c(v).double() - exact).abs().max().item() for c, v in zip(copies, (x, last))]
    return found, copies


group = {}
for mean in (30, 300, 3000):
    group[mean], _ = errors(torch.nn.GroupNorm(4, 32), torch.randn(16, 32, 16, 16) + mean)
    print("GroupNorm    mean %4d: largest error: contiguous %.2g, channels_last %.2g" % (mean, *group[mean]))
batch = {}
for shape in ((16, 8, 16, 16), (64, 8, 64, 64)):
    x = torch.randn(shape) + 3000
    n = x[:, 0].numel()
    true_mean = x.double().mean((0, 2, 3))
    found, learned = errors(torch.nn.BatchNorm2d(8, momentum=1.0), x)
    off = [(c.running_mean - true_mean).abs().max().item() for c in learned]
    var = [c.running_var.mean().item() for c in learned]
    batch[n] = found, off, var
    print(f"BatchNorm2d  mean 3000, {n:6} values a channel:")
    for i, order in enumerate(("contiguous", "channels_last")):
        print(f"    {order:13} largest error {found[i]:.2g}, running mean off by {off[i]:.2g}, running variance {var[i]:.2f}")
assert all(g[0] < 0.005 for g in group.values()) and group[30][1] < 0.01
assert group[300][1] > 100 * group[300][0] and group[3000][1] > 100
small, large = batch[4096], batch[262144]
assert small[0][1] < 0.05 and abs(small[2][1] - 1) < 0.1
assert large[0][0] < 0.005 and large[1][0] < 0.005 and abs(large[2][0] - 1) < 0.01
assert large[0][1] > 1 and large[1][1] > 1 and large[2][1] > 2
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# torch's InstanceNorm with momentum=None learns nothing, and never counts.
# Version: torch 2.13.0, 2026-11-30.
#
# Guessed: InstanceNorm shares its parameters with BatchNorm, so momentum=None with track_running_stats=True is the plain average
#   over all batches, and num_batches_tracked, which it has too, says how many there were.
# Instead: momentum=None is a momentum of 0: running_mean stays 0 and running_var 1, so in eval mode the layer lets everything
#   through as it is. num_batches_tracked is saved with the model and stays 0 with every momentum.
# Matters: update_bn and others set momentum=None to renew statistics; one's own loop that does it to all layers with running
#   statistics switches these off. In training mode nothing shows, as the layer does not use what it learns.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch import nn

seen = {}
for kind in (nn.BatchNorm1d, nn.InstanceNorm1d):
    for momentum in (0.1, None):
        torch.manual_seed(0)
        layer = kind(2, momentum=momentum, affine=False, track_running_stats=True)
        for _ in range(100):
            layer(2 * torch.randn(8, 2, 16) + 5)
        out = layer.eval()(2 * torch.randn(8, 2, 1000) + 5)
        seen[kind, momentum] = layer.running_mean.mean().item(), int(layer.num_batches_tracked), out.mean().item(), out.std().item()
        print("%-14s  momentum %-4s  running mean %.2f, batches counted %3d; eval mode gives mean %.2f, deviation %.2f"
              % (kind.__name__, momentum, *seen[kind, momentum]))
for (kind, momentum), (mean, count, out, spread) in seen.items():
    assert count == (100 if kind is nn.BatchNorm1d else 0)
    if kind is nn.InstanceNorm1d and momentum is None:
        assert mean == 0 and abs(out - 5) < 0.1 and abs(spread - 2) < 0.1
    else:
        assert abs(mean - 5) < 0.2 and abs(out) < 0.1 and abs(spread - 1) < 0.1
PY
"$dir/venv/bin/python" "$dir/finding.py"

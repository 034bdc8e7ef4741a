#!/usr/bin/env bash
# torch's update_bn recomputes the statistics of frozen layers too, and leaves them thawed.
# Version: torch 2.13.0, 2026-11-30.
#
# Guessed: swa_utils.update_bn renews the running statistics of the layers that learn, and gives the model back in the modes that
#   it had: it notes whether the model was training and restores that.
# Instead: every layer of batch normalization is reset, those in eval mode as well, and what is restored is the mode of the model
#   as a whole, for all modules in it. A frozen layer has lost the statistics that it was frozen with, is in training mode when
#   update_bn returns, and learns from then on; a dropout that was switched off drops again. On a model in eval mode only the
#   first of it shows.
# Matters: to fine-tune with frozen batch normalization and average the weights is common. Evaluate an average in the middle of
#   training by update_bn, and the model that goes on is another one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

torch.manual_seed(0)
loader = [torch.randn(16, 3) + 5 for _ in range(10)]
seen = {}
for training in (True, False):
    frozen, learns, dropout = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)
    model = nn.Sequential(frozen, dropout, nn.Linear(3, 3), learns).train(training)
    frozen.running_mean.fill_(7.0)  # what it was frozen with
    frozen.eval()
    dropout.eval()
    update_bn(loader, model)
    after = frozen.running_mean.mean().item()
    seen[training] = after, frozen.training, dropout.training, learns.training
    print("model in %s mode: frozen mean 7.00 -> %.2f; in training mode after it: frozen layer %s, dropout %s, other layer %s"
          % ("training" if training else "eval", *seen[training]))
assert all(abs(mean - 5) < 0.5 for mean, *_ in seen.values())
assert seen[True][1:] == (True, True, True) and seen[False][1:] == (False, False, False)
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

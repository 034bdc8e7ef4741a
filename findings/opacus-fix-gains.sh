#!/usr/bin/env bash
# opacus makes a trained network private by forgetting the gains and biases of its batch normalization.
# Version: opacus 1.6.0, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: ModuleValidator.fix replaces batch by group normalization; the statistics are lost, as they have to be, and the gain and
#   bias, which have the same shape and meaning in both layers, are taken over.
# Instead: the new layer begins with gains of 1 and biases of 0, without a warning. Of two networks that differ only in what their
#   normalization learned, the same network is made.
# Matters: fix is what the error message recommends, and fine-tuning of trained networks is the usual way to train with privacy.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from opacus.validators import ModuleValidator
from torch import nn


def network(gain, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.constant_(model[1].weight, gain)
    nn.init.constant_(model[1].bias, bias)
    return model


x = torch.randn(4, 3, 6, 6)
fixed = [ModuleValidator.fix(network(*learned)) for learned in ((1.0, 0.0), (0.2, 3.0))]
for learned, model in zip(((1.0, 0.0), (0.2, 3.0)), fixed):
    norm = model[1]
    print("gain and bias %s -> %s: gain %.1f, bias %.1f" % (learned, norm, norm.weight.mean(), norm.bias.mean()))
print("the convolution before is kept:", torch.equal(fixed[1][0].weight, network(0.2, 3.0)[0].weight))
assert torch.equal(fixed[1][0].weight, network(0.2, 3.0)[0].weight)
assert (fixed[1][1].weight == 1).all() and (fixed[1][1].bias == 0).all()
assert torch.equal(fixed[0](x), fixed[1](x))
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

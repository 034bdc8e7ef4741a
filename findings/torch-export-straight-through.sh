#!/usr/bin/env bash
# torch.export of a training graph drops the backward of an autograd.Function without a word.
# Version: torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: exporting a model whose layer has a gradient of its own (binary units, straight through) keeps that gradient, as
#   torch.compile does, or is refused.
# Instead: strict=False records the forward alone, so the layer before gets the gradient of sign(), which is 0; strict=True gives it no
#   gradient at all (None). The layer behind trains in both. No warning.
# Matters: an exported model that is trained further (on a device, say) learns with its last layers only. Whatever is made by a
#   Function is hit: quantizers, straight-through estimates, normalizations with a gradient of their own.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import copy

import torch
from torch import nn


class Sign(torch.autograd.Function):
    """Binary units with the usual straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, dy):
        return dy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(Sign.apply(self.first(x)))


torch.manual_seed(0)
net, x = Net(), torch.randn(16, 4)
runs = {"as it is": net, "compiled": torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)}
for strict in (False, True):
    runs[f"exported, strict={strict}"] = torch.export.export(copy.deepcopy(net), (x,), strict=strict).module()
grads = {}
for name, run in runs.items():
    run(x).square().mean().backward()
    grads[name] = {k.removeprefix("_orig_mod."): p.grad for k, p in run.named_parameters()}
    first, last = (grads[name][k + ".weight"] for k in ("first", "last"))
    print(f"{name:22}  gradient of the last layer {last.norm():.4f}, of the first",
          "None" if first is None else f"{first.norm():.4f}")
want = grads["as it is"]
for name, got in grads.items():
    assert torch.allclose(got["last.weight"], want["last.weight"])
    first = got["first.weight"]
    if "exported" in name:
        assert first is None or not first.any()
    else:
        assert torch.allclose(first, want["first.weight"]) and first.norm() > 0.01
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

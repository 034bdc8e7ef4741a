#!/usr/bin/env bash
# skorch's partial_fit makes ten passes over four fifths of a chunk.
# Version: skorch 1.4.0, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: as in scikit-learn, a call of partial_fit makes one pass over all samples that it is given.
# Instead: with the defaults it trains max_epochs = 10 passes each call, on 80 % of the chunk: a fifth is held out for validation
#   each time, and never learned. scikit-learn's MLPRegressor sees each sample once.
# Matters: on a stream a fifth of all data is thrown away, and the newest chunk is learned ten times as often as intended. One
#   pass needs max_epochs=1 and train_split=None.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 skorch==1.4.0 scikit-learn==1.9.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import numpy as np
import skorch
import torch
from sklearn.neural_network import MLPRegressor
from torch import nn

learned = {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        if self.training:
            for number in x[:, 0].tolist():
                learned[number] = learned.get(number, 0) + 1
        return self.linear(x)


X = np.arange(100, dtype="float32")[:, None]  # a sample is its number
y = X / 100
for options in ({}, {"max_epochs": 1, "train_split": None}):
    learned.clear()
    skorch.NeuralNetRegressor(Net, lr=1e-5, verbose=0, **options).partial_fit(X, y)
    print("%s: learned %d of 100 samples, each %s times" % (options or "defaults", len(learned), {*learned.values()}))
    assert (len(learned), {*learned.values()}) == ((100, {1}) if options else (80, {10}))
theirs = MLPRegressor(hidden_layer_sizes=(4,), batch_size=10).partial_fit(X, y.ravel())
print("scikit-learn's MLPRegressor: %d samples seen" % theirs.t_)
assert theirs.t_ == 100
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

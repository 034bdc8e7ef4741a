#!/usr/bin/env bash
# torch's GroupNorm refuses a single sample, also in eval mode, where it takes two of them.
# Version: torch 2.13.0, 2026-11-30.
#
# Guessed: group normalization treats each sample by itself, so whether it accepts a sample does not depend on how many others come
#   along. A group of one value has no deviation: it is refused, or it becomes 0, the same for 1 and for 64 samples.
# Instead: with one value in each group (GroupNorm(C, C) on a vector or on a 1x1 image) a batch of two or more passes and becomes 0
#   all over; a batch of one raises "Expected more than 1 value per channel when training", in eval mode too. The check counts the
#   values of a group over the whole batch, as if it were batch normalization. InstanceNorm1d on (n, C, 1), the same formula,
#   refuses every n.
# Matters: a model that was trained on batches fails on its first single sample, at serving time or on a stream; and the batches
#   that pass hide that the layer wipes out all that it is given.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch

torch.manual_seed(0)


def outcome(layer, x):
    try:
        return f"largest output {layer(x).abs().max().item():.0e}"
    except ValueError as error:
        return f"ValueError: {error}"


seen = {}
for training in (True, False):
    group = torch.nn.GroupNorm(4, 4).train(training)
    for n in (1, 2, 64):
        x = 10 * torch.randn(n, 4)
        seen[training, n] = outcome(group, x)
        print(f"GroupNorm(4, 4)   training={training!s:5}  {n:2} samples: {seen[training, n]}")
instance = {n: outcome(torch.nn.InstanceNorm1d(4), 10 * torch.randn(n, 4, 1)) for n in (1, 2)}
for n, said in instance.items():
    print(f"InstanceNorm1d(4) training=True   {n:2} samples: {said}")
one_group = outcome(torch.nn.GroupNorm(1, 4), torch.randn(1, 4))
for training in (True, False):
    assert "Expected more than 1 value per channel when training" in seen[training, 1]
    for n in (2, 64):
        assert seen[training, n].startswith("largest output") and float(seen[training, n].split()[-1]) < 0.01
assert all(said.startswith("ValueError") for said in instance.values())
assert one_group.startswith("largest output")  # a single sample as such is no trouble
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# torchmetrics' R2Score gives unrelated predictions any score, also 0.9 and more than 1, when the target lies far from 0.
# Version: torchmetrics 1.9.0 and torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: R2Score and ExplainedVariance gather their sums batch by batch and lose a few digits; for float32 targets around 30000
#   with deviation 1 they are right to 0.01.
# Instead: the variance of the target is taken as the sum of squares less n times the squared mean, in float32. Predictions that are
#   noise around the same mean, with a true score of about -1, get scores from -1.4 to 3.4 around 3000, where 1 is the best that there
#   is, and from 0 to 1 around 30000. PearsonCorrCoef, which keeps running means, says 0 to the same batches and is right.
# Matters: a score above 1 one can see is wrong; a useless model with 0.9 one believes. Temperatures in kelvin, years, prices and
#   positions are such targets.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
from torchmetrics import ExplainedVariance, PearsonCorrCoef, R2Score

seen = {}
for mean in (0, 300, 3000, 30000):
    rows = []
    for seed in range(20):
        torch.manual_seed(seed)
        target, noise = mean + torch.randn(10000), mean + torch.randn(10000)
        metrics = R2Score(), ExplainedVariance(), PearsonCorrCoef()
        for i in range(0, 10000, 500):
            for metric in metrics:
                metric.update(noise[i : i + 500], target[i : i + 500])
        t, p = target.double(), noise.double()
        true = 1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum()
        rows.append([true.item(), *(m.compute().item() for m in metrics)])
    seen[mean] = list(zip(*rows))
    print(f"mean {mean}, 20 draws:", ", ".join(
        f"{name} {min(column):.2f} to {max(column):.2f}"
        for name, column in zip(("true R2", "R2Score", "ExplainedVariance", "PearsonCorrCoef"), seen[mean])
    ))
for mean, (true, r2, explained, pearson) in seen.items():
    assert -1.2 < min(true) < max(true) < -0.8 and max(map(abs, pearson)) < 0.05
    wrong = max(abs(a - b) for a, b in zip(r2, true)), max(abs(a - b) for a, b in zip(explained, true))
    assert max(wrong) < 0.3 if mean <= 300 else min(wrong) > 0.8
assert max(seen[30000][1]) > 0 and max(seen[30000][2]) > 0
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

#!/usr/bin/env bash
# river's exponentially weighted variance can be below zero, and AdaptiveStandardScaler then makes every value 0.
# Version: river 0.26.1, 2026-11-30.
#
# Guessed: row by row river's statistics are exact (Var follows Welford; it is right to the last digits here), and EWVar with
#   them.
# Instead: EWVar takes the weighted mean of x^2 and subtracts the square of the weighted mean, in float64. For times in seconds
#   since 1970 (1.76e9) with deviation 10 it wanders between -3000 and 9000, where 100 is right. AdaptiveStandardScaler, which
#   scales by it, makes one deviation 0.1 to 0.5 instead of 1, and exactly 0 wherever the variance is negative.
# Matters: times, identifiers and map coordinates are such values. The scaler that is advised for streams that drift is the one
#   that cannot take values that have drifted far from 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import numpy as np
from river import preprocessing, stats

rng = np.random.default_rng(0)
seen = {}
for mean in (0.0, 1.76e9):
    plain, weighted, scaler = stats.Var(), stats.EWVar(0.01), preprocessing.AdaptiveStandardScaler(fading_factor=0.01)
    track, outputs = [], []
    for value in (mean + 10 * rng.standard_normal(3000)).tolist():
        plain.update(value)
        weighted.update(value)
        scaler.learn_one({"t": value})
        track.append(weighted.get())
        outputs.append(scaler.transform_one({"t": mean + 10})["t"])
    track, outputs = track[1000:], outputs[1000:]
    seen[mean] = plain.get(), min(track), max(track), min(outputs), max(outputs), outputs.count(0.0)
    print("mean %.3g, variance 100: Var %.1f, EWVar between %.0f and %.0f;" % (mean, *seen[mean][:3]))
    print("    one deviation is scaled to between %.3f and %.3f, %d of 2000 times to 0" % seen[mean][3:])
var, low, high, small, large, zeros = seen[0.0]
assert abs(var - 100) < 10 and low > 50 and high < 200 and 0.5 < small < large < 1.7 and zeros == 0
var, low, high, small, large, zeros = seen[1.76e9]
assert abs(var - 100) < 10 and low < -1000 and high > 5000 and small == 0 and large < 0.7 and zeros > 100
PY
"$dir/venv/bin/python" "$dir/finding.py"

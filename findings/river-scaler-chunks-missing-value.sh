#!/usr/bin/env bash
# One missing value (NaN) in a chunk leaves river's StandardScaler with a mean and a count, but no variance, for good.
# Version: river 0.26.1 and pandas 3.1.1, 2026-11-30.
#
# Guessed (as a careful user would): learn_many either skips the missing value or passes it on as NaN, in count, mean and
#   variance alike.
# Instead: count and mean skip it and are right; the variance becomes NaN and stays NaN, whatever comes later. transform_many then
#   silently subtracts the mean and does not scale, while transform_one of the same scaler gives NaN.
# Matters: that the mean is right looks like support for missing values, which tables are full of. On a long stream a single gap
#   turns the scaler into one that only subtracts the mean, and nothing is raised.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 pandas==3.1.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import math

import numpy as np
import pandas as pd
from river import preprocessing

scaler = preprocessing.StandardScaler()
rng = np.random.default_rng(0)
chunk = pd.DataFrame({"a": [100.0, 200.0, np.nan, 300.0]})
scaler.learn_many(chunk)
first = scaler.counts["a"], scaler.means["a"], scaler.vars["a"]
print("after a chunk of 100, 200, missing, 300: count %s, mean %s, variance %s" % first)
for _ in range(100):
    scaler.learn_many(pd.DataFrame({"a": 200 + 50 * rng.standard_normal(20)}))
print(f"100 whole chunks later: count {scaler.counts['a']}, mean {scaler.means['a']:.2f}, variance {scaler.vars['a']}")
many = scaler.transform_many(pd.DataFrame({"a": [300.0]}))["a"].item()
one = scaler.transform_one({"a": 300.0})["a"]
print(f"300, scaled: by transform_many {many:.2f} (right is about 2), by transform_one {one}")
assert first[0] == 3 and first[1] == 200 and math.isnan(first[2])
assert scaler.counts["a"] == 2003 and abs(scaler.means["a"] - 200) < 5 and math.isnan(scaler.vars["a"])
assert many == 300 - scaler.means["a"] and math.isnan(one)
PY
"$dir/venv/bin/python" "$dir/finding.py"

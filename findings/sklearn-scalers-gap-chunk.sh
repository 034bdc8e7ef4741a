#!/usr/bin/env bash
# A chunk in which a feature is missing altogether ruins sklearn's scalers for good; a missing value here and there does not.
# Version: scikit-learn 1.9.1, 2026-11-30.
#
# Guessed: StandardScaler, MinMaxScaler and MaxAbsScaler leave out NaN when they fit, so partial_fit leaves out a feature that is
#   NaN in a whole chunk, and learns on with the next one.
# Instead: after such a chunk, the first or a later one, the feature's mean, minimum and maximum are NaN and stay NaN, and
#   whatever comes is transformed to NaN. numpy warns once of an empty slice or a division, and from then on nothing is said. fit
#   on the same rows at once is right. (Sparse input was not tried.)
# Matters: a sensor that is off for as long as a chunk lasts is the usual way for values to be missing on a stream, and a chunk of
#   one row turns each missing value into such a gap.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import numpy as np
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, StandardScaler

rng = np.random.default_rng(0)
whole = 10 + rng.standard_normal((20, 50, 1))  # 20 chunks of 50 rows


def outputs(scaler, gap, rows):
    chunks = whole.copy()
    chunks[gap, rows] = np.nan
    at_once = type(scaler)().fit(np.concatenate(chunks))
    for chunk in chunks:
        scaler.partial_fit(chunk)
    return scaler.transform([[11.0]]).item(), at_once.transform([[11.0]]).item()


seen = {}
for where, gap, rows in (
    ("half of a chunk", 5, slice(0, 25)),
    ("a chunk, in the middle", 5, slice(None)),
    ("a chunk, the first", 0, slice(None)),
):
    for kind in (StandardScaler, MinMaxScaler, MaxAbsScaler):
        parts, at_once = seen[where, kind] = outputs(kind(), gap, rows)
        print(f"missing: {where:22}  {kind.__name__:14}  11 becomes {parts:6.3f} by chunks, {at_once:6.3f} by fit")
for (where, _), (parts, at_once) in seen.items():
    if where == "half of a chunk":
        assert abs(parts - at_once) < 1e-9
    else:
        assert np.isnan(parts) and np.isfinite(at_once)
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"

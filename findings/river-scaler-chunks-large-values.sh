#!/usr/bin/env bash
# river's StandardScaler learns another variance from chunks than from rows when values are large, in float64.
# Version: river 0.26.1 and pandas 3.1.1, 2026-11-30.
#
# Guessed: learn_many on chunks and learn_one on the rows give the same variance but for the last digits; its docstring says the same
#   result exactly.
# Instead: for times in seconds since 1970 (1.76e9) that spread by 10 s, learn_one has the right variance of about 100 and learn_many
#   one that is wrong by half or more: it takes mean(x^2) - mean(x)^2 inside each chunk. For a spread of 0.1 s the learned variance
#   can be below 0.
# Matters: both are meant to be mixed freely: warm up on chunks, go on with rows. The error is silent, differs from chunk to chunk
#   and stays in the statistics. Times, identifiers and map coordinates in metres are such values.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 pandas==3.1.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import numpy as np
import pandas as pd
from river import preprocessing

rng = np.random.default_rng(0)
ratio = {}
for mean, spread in ((0.0, 10.0), (1.76e9, 10.0), (1.76e9, 0.1)):
    x = mean + spread * rng.standard_normal(1000)
    rows, chunks = preprocessing.StandardScaler(), preprocessing.StandardScaler()
    for value in x:
        rows.learn_one({"t": value})
    for i in range(0, 1000, 50):
        chunks.learn_many(pd.DataFrame({"t": x[i : i + 50]}))
    r, c = rows.vars["t"], chunks.vars["t"]
    print(f"mean {mean:.3g}, spread {spread}: variance {x.var():.4g}, from rows {r:.4g}, from chunks {c:.4g}")
    assert abs(chunks.means["t"] - rows.means["t"]) < 1e-3  # the means agree
    ratio[mean, spread] = r / x.var(), c / x.var()
assert all(abs(r - 1) < 0.01 for r, _ in ratio.values())
assert abs(ratio[0.0, 10.0][1] - 1) < 1e-9
assert abs(ratio[1.76e9, 10.0][1] - 1) > 0.1
assert abs(ratio[1.76e9, 0.1][1] - 1) > 10
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# A value that has left the window of river's Rolling still decides what it says.
# Version: river 0.26.1, compared with pandas 3.1.1, 2026-11-30.
#
# Guessed: a rolling mean or variance over five values depends on those five values.
# Instead: old values are subtracted again, so what a large one has rounded off is not restored. After one reading of 1e10 among
#   ones and twos the rolling variance is 0.05 instead of 0.3, at the next window and a hundred values later; after one of 1e17
#   the rolling mean is 0.4, below the smallest value in the window. An infinite reading leaves NaN for good. pandas' rolling is
#   right in all three cases.
# Matters: glitches and "missing" codes like 3.4e38 are what sensors send, and a window is chosen to be rid of them after its
#   length.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 pandas==3.1.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import math

import pandas as pd
from river import stats, utils

WINDOW = 5
quiet = [1.0, 2.0] * 50


def last(kind, values):
    rolling = utils.Rolling(kind, window_size=WINDOW)
    for value in values:
        rolling.update(value)
    return rolling.get()


seen = {}
for glitch in (1e6, 1e10, 1e17, math.inf):
    values = [*quiet, glitch, *quiet]
    rolling = pd.Series(values).rolling(WINDOW)
    theirs = last(stats.Mean, values), last(stats.Var, values)
    seen[glitch] = theirs, (rolling.mean().iloc[-1], rolling.var().iloc[-1])
    print(f"glitch {glitch:5.0e}, 100 values later: river mean %.3f variance %.3f," % theirs, "pandas %.3f %.3f" % seen[glitch][1])
truth = 1.6, 0.3
for glitch, (theirs, pandas) in seen.items():
    assert all(abs(p - t) < 1e-9 for p, t in zip(pandas, truth))
    if glitch == math.inf:
        assert all(math.isnan(v) for v in theirs)
    else:
        assert (abs(theirs[1] - 0.3) > 0.1) == (glitch > 1e6)
        assert (theirs[0] < 1) == (glitch > 1e10)
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# One NaN switches most of river's drift detectors off for good, without a word.
# Version: river 0.26.1, 2026-11-30.
#
# Guessed: a missing value is refused, or left out; at worst the detector restarts.
# Instead: after a single NaN among 500 ordinary values, ADWIN, PageHinkley, DDM, HDDMA and HDDMW never report a drift again,
#   however large: the sums they keep are NaN, and every comparison with NaN is false. KSWIN, which keeps the values themselves,
#   and EDDM, which takes NaN for an error, go on.
# Matters: a detector that is silent looks like a stream without drift. What is fed to it is often a loss or a feature, and one
#   division by zero months ago is enough.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import math

import numpy as np
from river import drift

rng = np.random.default_rng(0)
level = np.concatenate([np.zeros(1000), np.full(3000, 10.0)])
values = (level + rng.standard_normal(4000)).tolist()  # a jump of ten deviations at 1000
errors = (rng.random(4000) < np.where(level > 0, 0.9, 0.1)).astype(float).tolist()  # a rate that goes from 0.1 to 0.9


def first_drift(kind, stream, gap):
    detector = kind()
    for i, value in enumerate(stream):
        detector.update(math.nan if i == gap else value)
        if i >= 1000 and detector.drift_detected:
            return i
    return None


real = {"ADWIN": drift.ADWIN, "PageHinkley": drift.PageHinkley, "KSWIN": lambda: drift.KSWIN(seed=0)}
binary = {name: getattr(drift.binary, name) for name in ("DDM", "EDDM", "HDDMA", "HDDMW")}
seen = {}
for kinds, stream in ((real, values), (binary, errors)):
    for name, kind in kinds.items():
        seen[name] = first_drift(kind, stream, None), first_drift(kind, stream, 500)
        print("%-12s first drift after the jump at 1000: %s, with a NaN at 500: %s" % (name, *seen[name]))
for name, (whole, gap) in seen.items():
    assert whole is not None and whole < 1200
    assert (gap is not None) == (name in ("KSWIN", "EDDM"))
PY
"$dir/venv/bin/python" "$dir/finding.py"

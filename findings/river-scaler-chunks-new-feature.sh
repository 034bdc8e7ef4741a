#!/usr/bin/env bash
# A feature that river's StandardScaler has not learned yet: transform_one makes it 0, transform_many lets it through as it is.
# Version: river 0.26.1 and pandas 3.1.1, 2026-11-30.
#
# Guessed: a KeyError, or the same answer from both.
# Instead: for a new feature of value 4000 transform_one says 0.0 and transform_many says 4000.0, beside neighbours that are scaled.
#   After a first learn_many of that single row both say 0.
# Matters: on a stream features come up late, and one transforms before one learns. By rows a model meets a new feature as "average";
#   by chunks it meets a raw value thousands of deviations from all that it knows, and a linear learner takes a step to match.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check river==0.26.1 pandas==3.1.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import pandas as pd
from river import preprocessing

scaler = preprocessing.StandardScaler()
scaler.learn_many(pd.DataFrame({"a": [1.0, 3.0]}))
row = {"a": 3.0, "late": 4000.0}


def both():
    return scaler.transform_one(row), scaler.transform_many(pd.DataFrame([row])).iloc[0].to_dict()


before = both()
print("before 'late' was learned: transform_one", before[0], "transform_many", before[1])
scaler.learn_many(pd.DataFrame([row]))
after = both()
print("after one row of it:       transform_one", after[0], "transform_many", after[1])
assert before == ({"a": 1.0, "late": 0.0}, {"a": 1.0, "late": 4000.0})
assert after[0]["late"] == after[1]["late"] == 0.0 and abs(after[0]["a"] - after[1]["a"]) < 1e-9
PY
"$dir/venv/bin/python" "$dir/finding.py"

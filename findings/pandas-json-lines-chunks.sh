#!/usr/bin/env bash
# pandas reads the same JSON lines as text, integers, fractions or dates, by where the chunks end.
# Version: pandas 3.1.1, 2026-11-30.
#
# Guessed: JSON says itself what is text and what is a number, so unlike CSV a column keeps its type from chunk to chunk.
# Instead: texts are tried as numbers in each chunk. The codes "12", "7", "x1", "30", "007", "1e5" come as integers in one chunk,
#   as text in the next and as fractions in the third, where "007" is 7.0 and "1e5" 100000.0; read at once all six are text. A
#   column of integers called "modified" (or one that ends in _at or _time) is integers until its values pass 31536000, and dates
#   from there on.
# Matters: keys and codes no longer match between chunks, and a counter turns into a date in the middle of a stream. dtype=False
#   leaves both as they stand in the file.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check pandas==3.1.1 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import io
import json

import pandas as pd

codes = ["12", "7", "x1", "30", "007", "1e5"]
rows = "\n".join(json.dumps({"code": c, "modified": i * 10**7}) for i, c in enumerate(codes, 1))


def read(**options):
    found = pd.read_json(io.StringIO(rows), lines=True, **options)
    return [found] if isinstance(found, pd.DataFrame) else list(found)


ways = {
    "by chunks of two": read(chunksize=2),
    "at once": read(),
    "by chunks, no conversion": read(chunksize=2, dtype=False),
}
for name, frames in ways.items():
    print(name)
    for frame in frames:
        print(f"    code {str(frame['code'].dtype):8} {frame['code'].tolist()}   modified {frame['modified'].dtype}")
kinds = {name: [[f[c].dtype.kind for f in frames] for c in ("code", "modified")] for name, frames in ways.items()}
chunks = ways["by chunks of two"]
assert [f["code"].tolist() for f in chunks] == [[12, 7], ["x1", "30"], [7.0, 100000.0]]
assert kinds["by chunks of two"] == [["i", "O", "f"], ["i", "i", "M"]]
assert ways["at once"][0]["code"].tolist() == codes
assert [v for f in ways["by chunks, no conversion"] for v in f["code"]] == codes
assert kinds["by chunks, no conversion"][1] == ["i", "i", "i"]
PY
"$dir/venv/bin/python" "$dir/finding.py"

#!/usr/bin/env bash
# Whether scipy reads a quoted value of an ARFF file depends on what stands in the first row.
# Version: scipy 1.17.1 (liac-arff 2.5.0 reads all four), 2026-11-30.
#
# Guessed: the format allows a value with a space in single or in double quotes, and rows are independent: an order of rows that
#   can be read can be read in any order.
# Instead: the kind of quotes is guessed from the first data row and kept. 'dark blue' in single quotes is read if the first row
#   has single quotes, and is a ValueError ("value not in") if it comes later; double quotes are read anywhere unless the first
#   row has single ones. liac-arff writes single quotes, and only where a value needs them, so its files are hit.
# Matters: a stream that is cut or shuffled is written to files of which some can be read and some cannot, and the error blames a
#   value that the header does declare.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1 liac-arff==2.5.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import io

import arff
from scipy.io.arff import loadarff

HEADER = "@relation r\n@attribute x numeric\n@attribute c {red,'dark blue'}\n@data\n"


def by_scipy(text):
    try:
        return [value.decode() for _, value in loadarff(io.StringIO(text))[0]]
    except ValueError as error:
        return f"ValueError: {error}"


rows = {
    "single quotes, first row": "1,'dark blue'\n2,red\n",
    "single quotes, second row": "2,red\n1,'dark blue'\n",
    "double quotes, second row": "2,red\n1,\"dark blue\"\n",
    "single, then double quotes": "1,'dark blue'\n2,\"dark blue\"\n",
}
seen = {}
for name, data in rows.items():
    other = [value for _, value in arff.loads(HEADER + data)["data"]]
    seen[name] = by_scipy(HEADER + data), other
    print(f"{name:26}  scipy: {seen[name][0]}\n{'':26}  liac-arff: {other}")
attributes = [("x", "NUMERIC"), ("c", ["red", "dark blue"])]
data = [[1.0, "dark blue"], [2.0, "red"]]
written = [by_scipy(arff.dumps({"relation": "r", "attributes": attributes, "data": d})) for d in (data, data[::-1])]
print("written by liac-arff, read by scipy:", written[0], "in reverse order:", written[1])
for name, (got, other) in seen.items():
    assert "dark blue" in other
    if name in ("single quotes, first row", "double quotes, second row"):
        assert got == other
    else:
        assert got.startswith("ValueError") and "value not in" in got
assert written[0] == ["dark blue", "red"] and written[1].startswith("ValueError")
PY
"$dir/venv/bin/python" "$dir/finding.py"

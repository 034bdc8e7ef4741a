#!/usr/bin/env bash
# What liac-arff writes it does not always read back: a brace is an error, a long integer another number.
# Version: liac-arff 2.5.0, 2026-11-30.
#
# Guessed: dumps quotes what needs quotes (it does for commas, blanks, percent signs, both quotes and newlines), so loads gives
#   back every STRING; and an INTEGER column, whose values come back as Python integers, is exact.
# Instead: a text with { or } is written without quotes, and the file cannot be read by the library that wrote it (BadLayout).
#   Integers pass through a float: a time in nanoseconds since 1970 comes back rounded to 256 ns, still an int, and two
#   identifiers that differ can come back equal. The file itself has the right digits; it is the reader that loses them.
# Matters: a stream's keys, times and log lines are just these. The first loss is loud but comes when the data are already away,
#   the second is silent, and order or joins by such a column are wrong.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check liac-arff==2.5.0
cat > "$dir/finding.py" <<'PY'
import arff


def round_trip(kind, values):
    text = arff.dumps({"relation": "r", "attributes": [("v", kind)], "data": [[v] for v in values]})
    written = text.split("@DATA\n")[1].splitlines()[: len(values)]
    try:
        return written, [row[0] for row in arff.loads(text)["data"]]
    except arff.BadLayout as error:
        return written, f"BadLayout: {error}"


texts = {}
for text in ("a,b", "50% off", "it's", '"q"', "two\nlines", "{id}", "a}"):
    written, read = round_trip("STRING", [text])
    texts[text] = read
    print(f"{text!r:12} is written {written[0]:14} and read {read}")
times = [1764500000123456789, 1764500000123456790, 2**60 + 1]
written, read = round_trip("INTEGER", times)
for t, w, r in zip(times, written, read):
    print(f"{t} is written {w} and read {r} ({type(r).__name__}), off by {r - t}")
for text, back in texts.items():
    if "{" in text or "}" in text:
        assert back.startswith("BadLayout")
    else:
        assert back == [text]
assert [int(w) for w in written] == times and all(type(r) is int for r in read)
assert read[0] == read[1] and all(0 < abs(r - t) <= 128 for r, t in zip(read, times))
PY
"$dir/venv/bin/python" "$dir/finding.py"

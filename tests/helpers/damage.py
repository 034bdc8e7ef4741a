"""What may be done to files of runs and of data: to bytes, JSON, lengths, shapes, dtypes and nestings."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NUMBERS = (0, 1, -1, 50_000, 10**6, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, 1e308, -0.0)


def damage_numbers(value: Any, made: random.Random) -> Any:
    """A nest of JSON, one of whose numbers is another one."""
    from mutations import places

    numbers = []
    for path in places(value):
        at = value
        for key in path:
            at = at[key]
        if isinstance(at, (int, float)):
            numbers.append(path)
    if not numbers:
        return value
    *way, last = made.choice(numbers)
    at = value
    for key in way:
        at = at[key]
    at[last] = made.choice(NUMBERS)
    return value


def damage_header(path: Path, made: random.Random) -> str:
    """What a safetensors file says of its tensors: lengths, dtypes, shapes, places, and of itself."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    what = made.choice(("length", "dtype", "shape", "offsets", "nest", "name", "many", "state", "metadata"))
    if what == "length":
        size = made.choice((0, 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"length {size}"
    one = header[made.choice(names)]
    if what == "dtype":
        one["dtype"] = made.choice(("F64", "BF16", "BOOL", "U8", "I64", "F8_E4M3", "C64", "x", 3, None))
    elif what == "shape":
        one["shape"] = made.choice(([], [0], [-1], [2**62, 4], [2**64], [2**32, 2**32], [1] * 5000, "x", [0.5]))
    elif what == "offsets":
        one["data_offsets"] = made.choice(([0, 2**63], [8, 0], [-8, 0], [0, len(body) + 1], [], ["0", "8"], [0, 0]))
    elif what == "nest":
        one["shape"] = "NEST"
    elif what == "name":
        header[made.choice(("", "../../x", "a" * 100_000, "\0"))] = one
    elif what == "many":
        header |= {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    elif what == "state":
        deep = '{"list": [' * 5000 + '{"value": 0}' + "]}" * 5000
        said = (deep, "[]", "{}", '{"dict": [[]]}', '{"tensor": "none"}', '{"dict": [[[1], {"value": 1}]]}', "")
        header["__metadata__"]["state"] = made.choice(said)
    else:
        header["__metadata__"] = made.choice((None, {}, {"format": "pt"}, {"format": 3}, "x", {"state": "{}"}))
    text = json.dumps(header).replace('"NEST"', "[" * 50_000 + "]" * 50_000)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)
    return what


def damage_sizes(path: Path, made: random.Random) -> str:
    """One number of a checkpoint's state, its checksum right."""
    from streamnorm.lab.runs import checkpoint

    checkpoint.save(path, damage_numbers(checkpoint.load(path), made))
    return "a number"


def damage_rows(path: Path, made: random.Random) -> str:
    """Lines of rows, packed as they were."""
    packed = path.suffix == ".gz"
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    lines = data.split(b"\n")
    at = made.randrange(len(lines))
    is_json = path.suffix == ".jsonl"
    strange = (
        *(b"", b"\0", b"\xff\xfe", b",", b'"', b"," * 5000, b"9" * 5000, b"1e999,nan,inf,-inf,", b'"' + b"x" * 200_000),
        *(
            b"[" * 30_000,
            b'{"a":' * 30_000,
            b'{"y": 1, "a": ' + b"9" * 5000 + b"}",
            b'{"y": {"y": {}}}',
            b"x" * (1 << 21),
        ),
        b"null" if is_json else b"a,a,a,a,a",
    )
    if made.random() < 0.2:
        at = 0
    lines[at] = made.choice(strange)
    new = b"\n".join(lines)
    if packed and made.random() < 0.3:  # a small file that becomes a large one
        new += b"\n" + b"x" * (64 << 20)
    path.write_bytes(gzip.compress(new, 1) if packed else new)
    return f"line {at + 1}"


def damage_idx(path: Path, made: random.Random) -> str:
    """The header of an idx file, or more behind it than is said there."""
    data = path.read_bytes()
    packed = data.startswith(b"\x1f\x8b")
    data = gzip.decompress(data) if packed else data
    what = made.choice(("size", "bomb", "labels"))
    if what == "size":
        at = 4 * made.randrange(1, 4)
        data = data[:at] + struct.pack(">I", made.choice((0, 1, 2**31, 2**32 - 1))) + data[at + 4 :]
    elif what == "labels":
        data = data[:8] + bytes(made.randrange(256) for _ in data[8:])
    else:
        shutil.copy(path.parents[1] / "bomb.gz", path)
        return what
    path.write_bytes(gzip.compress(data) if packed else data)
    return what


def damage_parquet(path: Path, made: random.Random) -> str:
    """Images of other sizes, kinds and labels, in a file that is right."""
    import pyarrow
    import torch
    from images import encode, labels, random_pixels, write_parquet

    what = made.choice(("large", "kind", "labels", "columns", "null", "header"))
    pixels: list[Any] = [encode(x, "PNG") for x in random_pixels(10, 3, 32, 32)]
    at: list[Any] = labels(10)
    column = "img"
    if what == "large":
        pixels[3] = encode(torch.zeros(3, 8000, 8000, dtype=torch.uint8), "PNG")
    elif what == "header":  # says it is huge
        pixels[3] = pixels[3][:16] + struct.pack(">II", made.choice((1, 2**20, 2**31 - 1)), 2**16) + pixels[3][24:]
    elif what == "kind":
        pixels[3] = made.choice((b"", b"\x89PNG", b"GIF89a", b"\xff\xd8\xff\xe0" + bytes(40)))
    elif what == "labels":
        at[3] = made.choice((10, -1, 2**62))
    elif what == "null":
        at[3] = None
    else:
        column = "image"
    with suppress(pyarrow.ArrowException):
        write_parquet(path, pixels, at, column)
    return what


def damages(path: Path) -> list[Callable[[Path, random.Random], str]]:
    """What may be done to a file."""
    from mutations import damage_bytes, damage_json, damage_state

    if path.suffix == ".safetensors":
        return [damage_bytes, damage_header, damage_state, damage_sizes, damage_sizes]
    if path.suffix == ".parquet":
        return [damage_bytes, damage_parquet]
    if "rows" in path.parts:
        return [damage_bytes, damage_rows, damage_rows]
    if "idx" in path.name:
        return [damage_bytes, damage_idx]
    return [damage_bytes, damage_json] if path.suffix in (".json", ".jsonl") else [damage_bytes]

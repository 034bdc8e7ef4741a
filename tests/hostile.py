"""``make hostile``: files that nobody of ours has written are read or refused, in bounded time and memory.

    python tests/hostile.py --files 10000             every kind in turn
    python tests/hostile.py --kind checkpoint --seed 7    one file again

A file of a run or of data is damaged: bytes, JSON, or what a checkpoint says of lengths, shapes, dtypes and nestings
with a right checksum. Whatever reads it takes it, or refuses it in one line that names it; within ``SECONDS`` of a
processor, in ``BYTES`` more than before, and without a process, a connection or anything unpickled. Each exception to
that is printed with the command that reproduces it; the status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

SECONDS, BYTES = 20, 1 << 30
TOGETHER = 50
"""Files that a process reads."""
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def write_originals(folder: Path) -> None:
    """Small files of every kind, as our commands write and read them."""
    import texts
    from images import encode, labels, random_pixels, write_mnist, write_parquet
    from rows_of import as_json, learned, mixed
    from toy import small, toy

    from streamnorm.lab.cli import main
    from streamnorm.lab.runs.classifier.loop import train
    from streamnorm.lab.runs.language.loop import train_text

    train(small(epochs=1), toy(), folder / "classifier")
    train_text(texts.small(epochs=1), texts.tiny(500), folder / "language")
    learned(mixed(60), folder / "learn", limit=40, checkpoint_every=20)
    tiny = ["--epochs", "1", "--width", "4", "--train-limit", "128", "--test-limit", "20", "--monitor", "1"]
    with Path(os.devnull).open("w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            main(["train", "--out", str(folder / "image"), *tiny])
        finally:
            sys.stdout = stdout
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.csv").write_text(mixed(60))
    (folder / "rows" / "rows.jsonl").write_text(as_json(mixed(60)))
    (folder / "rows" / "rows.csv.gz").write_bytes(gzip.compress(mixed(60).encode()))
    write_mnist(folder / "mnist")
    (folder / "cifar10").mkdir()
    for name in ("train", "test"):
        pixels = [encode(x, "PNG") for x in random_pixels(10, 3, 32, 32)]
        write_parquet(folder / "cifar10" / f"{name}-00000-of-00001.parquet", pixels, labels(10))
    with gzip.open(folder / "bomb.gz", "wb", compresslevel=1) as file:  # 2 MB that become 512 MB
        for _ in range(32):
            file.write(bytes(16 << 20))
    (folder / "text").mkdir()
    (folder / "text" / "text.txt").write_text(texts.WORDS * 30)


# --- Readers


def classifier(folder: Path) -> None:
    from toy import small, toy

    from streamnorm.lab.runs import keeping
    from streamnorm.lab.runs.classifier.loop import Trainer

    keeping._go_on(Trainer(small(epochs=1), toy()), folder)


def language(folder: Path) -> None:
    import texts

    from streamnorm.lab.runs import keeping
    from streamnorm.lab.runs.language.loop import TextTrainer

    keeping._go_on(TextTrainer(texts.small(epochs=1), texts.tiny(500)), folder)


def reopened(folder: Path) -> None:
    from streamnorm.lab.runs.keeping import state_at
    from streamnorm.lab.runs.reopen import reopen

    reopen(folder, state_at(folder))


def rebuilt(folder: Path) -> None:
    from streamnorm.lab.runs.checkpoint import said_of
    from streamnorm.lab.runs.keeping import state_at, trained_state
    from streamnorm.lab.runs.language import loop

    trained_state(folder, "a language model")
    with said_of(folder):
        loop.rebuilt(state_at(folder))


def monitored(folder: Path) -> None:
    from streamnorm.monitoring.monitor import read

    read(folder / "monitor.jsonl")


def learn(folder: Path) -> None:
    from rows_of import learned, mixed

    learned(mixed(60), folder, checkpoint_every=20)


def rows(folder: Path) -> None:
    from rows_of import job

    from streamnorm.lab.learning.session import session

    (path,) = (p for p in folder.iterdir() if p.name.startswith("rows."))
    with path.open("rb") as file:
        kind = "jsonl" if path.suffix == ".jsonl" else "csv"
        with session(job(name=str(path), format=kind), folder / "out", file, lambda _: None) as made:
            made.run(lambda: None)


def mnist(folder: Path) -> None:
    from streamnorm.lab.runs.classifier.data import load

    load("mnist", folder)


def cifar10(folder: Path) -> None:
    from streamnorm.lab.runs.classifier.data import load

    load("cifar10", folder)


def text(folder: Path) -> None:
    from streamnorm.lab.runs.language.data import load_text

    load_text(str(folder / "text.txt"))


KINDS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], None]]] = {
    "classifier": ("classifier", ("checkpoint.safetensors", "run.json"), classifier),
    "language": ("language", ("checkpoint.safetensors", "run.json"), language),
    "reopened": ("image", ("checkpoint.safetensors",), reopened),
    "rebuilt": ("language", ("checkpoint.safetensors",), rebuilt),
    "monitor": ("image", ("monitor.jsonl",), monitored),
    "learn": ("learn", ("checkpoint.safetensors", "run.json"), learn),
    "csv": ("rows", ("rows.csv",), rows),
    "jsonl": ("rows", ("rows.jsonl",), rows),
    "gzip": ("rows", ("rows.csv.gz",), rows),
    "mnist": ("mnist", ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte"), mnist),
    "cifar10": ("cifar10", ("train-00000-of-00001.parquet",), cifar10),
    "text": ("text", ("text.txt",), text),
}
"""By name: the folder of the originals, the files that are damaged, and what reads them."""


def one(kind: str, seed: int, originals: Path, work: Path) -> tuple[bool, str]:
    """Whether a damaged file was refused; and what was wrong with that, or an empty text."""
    from damage import damages

    made = random.Random(f"{kind} {seed}")
    source, names, read = KINDS[kind]
    folder = work / f"{kind}-{seed}"
    if source == "rows":
        folder.mkdir(parents=True)
        shutil.copy(originals / source / names[0], folder)
    else:
        shutil.copytree(originals / source, folder)
        if source == "mnist" and not (work / "bomb.gz").exists():
            shutil.copy(originals / "bomb.gz", work)
    path = folder / made.choice(names)
    try:
        said = made.choice(damages(path))(path, made)
        here = f"{path.name}, {said}"
        try:
            with warnings.catch_warnings(action="ignore"):
                read(folder)
        except (ValueError, OSError) as error:
            line = str(error)
            if "\n" in line or len(line) > 1500 or (str(folder) not in line and path.name not in line):
                return True, f"{here}: refused by {line[:1500]!r}"
            return True, ""
        except BaseException:
            return True, f"{here}: {traceback.format_exc()[-1500:]}"
        return False, ""
    finally:
        shutil.rmtree(folder)


def some(kind: str, seeds: range, originals: Path, work: Path, report: int) -> None:
    """Files of a kind, each with a line for the parent before and after it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    seen: list[str] = []
    sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(FORBIDDEN) else None)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    for seed in seeds:
        os.write(report, (json.dumps([seed]) + "\n").encode())
        seen.clear()
        refused, wrong = one(kind, seed, originals, work)
        if seen:
            wrong += f" it did {', '.join(seen)}"
        os.write(report, (json.dumps([seed, refused, wrong]) + "\n").encode())


def watched(kind: str, seeds: range, originals: Path, work: Path) -> tuple[int, list[tuple[int, str]], int]:
    """How many were read and refused in a child; what was wrong, by seed; and the seed to go on with."""
    inside, outside = os.pipe()
    child = os.fork()
    if not child:
        os.close(inside)
        try:
            some(kind, seeds, originals, work, outside)
        finally:
            os._exit(0)
    os.close(outside)
    refused, wrong, at, since, data = 0, list[tuple[int, str]](), seeds.start, time.monotonic(), b""
    used = 0.0
    os.set_blocking(inside, False)
    while True:
        with suppress(BlockingIOError):
            got = os.read(inside, 1 << 16)
            data += got
            if not got:
                break
        while b"\n" in data:
            line, _, data = data.partition(b"\n")
            at, *found = json.loads(line)
            since, used = time.monotonic(), spent(child)
            if found:
                refused += found[0]
                at += 1
                if found[1]:
                    wrong.append((at - 1, found[1]))
        if time.monotonic() - since > SECONDS * 30 or spent(child) - used > SECONDS:  # others may use the machine
            os.kill(child, signal.SIGKILL)
            wrong.append((at, "it takes too long"))
            at += 1
            break
        time.sleep(0.005)
    os.close(inside)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        wrong.append((at, f"its process ends with {os.waitstatus_to_exitcode(status)}"))
        at += 1
    return refused, wrong, at


def spent(child: int) -> float:
    """The processor seconds of a process."""
    with suppress(OSError):
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile files.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
    parser.add_argument("--files", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one file of each kind alone")
    asked = parser.parse_args()
    import pyarrow.parquet
    import torch

    assert pyarrow.parquet
    torch.set_num_threads(1)
    kinds: list[str] = asked.kind or list(KINDS)
    each = 1 if asked.seed is not None else -(-asked.files // len(kinds))
    first = asked.first if asked.seed is None else asked.seed
    failed, done, refused, begun = 0, 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streamnorm-hostile-") as folder:
        work = Path(folder)
        write_originals(work / "originals")
        for start in range(first, first + each, TOGETHER):
            for kind in kinds:
                at, end = start, min(start + TOGETHER, first + each)
                while at < end:
                    before = at
                    number, wrong, at = watched(kind, range(at, end), work / "originals", work)
                    refused += number
                    done += at - before
                    failed += len(wrong)
                    for seed, what in wrong:
                        print(f"\n{kind} {seed}: {what}\nagain: python tests/hostile.py --kind {kind} --seed {seed}")
            words = f"{done:,} files, {refused:,} refused, {failed} wrong, {time.monotonic() - begun:.0f} s"
            print(words, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

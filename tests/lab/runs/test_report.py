"""The report of a comparison: its page, its picture, its files; made of invented records and of trained ones."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser

import pytest
from records import CLEAR, epoch, run, runs_of
from toy import small, toy

from streamnorm.lab.runs.classifier.loop import train
from streamnorm.lab.runs.curves import picture
from streamnorm.lab.runs.report import write_report
from streamnorm.lab.runs.summary import sentence, summarize

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}
BROKE = "diverged: the loss became nan at update 70"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs = [
        *CLEAR,
        *runs_of("evil", 0.1, 0.2, 0.3, label='<script>alert("1 & 2")</script> $x^2$ _'),
        run("layer", 0, 0.4, 0.05),
        *[run("layer", seed, 0.4, failed=BROKE) for seed in (1, 2)],
    ]
    folder = tmp_path_factory.mktemp("out") / "deep" / "er"
    path = write_report(runs, folder, "Which <b>learns</b> & $why$?")
    return path, folder, runs


class Balance(HTMLParser):
    """Collects what is wrong with the nesting of tags, and every reference and text."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.references, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in {"src", "href", "srcset", "data", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_balanced_and_needs_no_network(written):
    text = written[0].read_text(encoding="utf-8")
    page = Balance()
    page.feed(text)
    page.close()
    assert (page.wrong, page.open) == ([], [])
    assert len(page.references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in text


def test_html_escapes_labels_and_title(written):
    text = written[0].read_text(encoding="utf-8")
    page = Balance()
    page.feed(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    shown = "".join(page.text)
    assert '<script>alert("1 & 2")</script> $x^2$ _' in shown
    assert "Which <b>learns</b> & $why$?" in shown


def test_html_has_the_sentence_the_settings_and_where_it_was_made(written):
    path, _, runs = written
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    shown = "".join(page.text)
    assert sentence(summarize(runs)) in shown.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "could not train",
        "[0.5, 0.25]",
        "made by tests/helpers/records.py",
        "some cpu",
        "2.13.0",
        "diverged (seeds 1 and 2)",
        BROKE,
    ):
        assert words in shown
    assert shown.count("[0.5, 0.25]") == 1, "what all runs share is shown once"
    assert '<tr class="best"><td>streaming' in path.read_text(encoding="utf-8")


def pixels(png):
    """Width, height and raw scan lines; raises for a broken file."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, size = 8, b"", (0, 0)
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    return *size, zlib.decompress(data)


def test_picture_is_a_png_of_reasonable_size(written):
    png = (written[1] / "curves.png").read_bytes()
    width, height, raw = pixels(png)
    assert width == 1800
    assert 600 < height < 2000
    assert len(raw) == height * (1 + 4 * width)
    assert 20_000 < len(png) < 1_000_000


@pytest.mark.parametrize("case", ["one epoch", "nothing trained", "zero loss", "many arms"])
def test_picture_of_odd_runs(case):
    runs = {
        "one epoch": [run("none", 0, 0.3)],
        "nothing trained": [run("none", 0, failed="no room")],
        "zero loss": [{**run("none", 0), "metrics": [epoch(1, 0.0, 0.0), epoch(2, 1e30, 0.9)]}],
        "many arms": [run(f"arm {i % 6}", 0, 0.3, 0.2, label=f"label {i} " * 4) for i in range(20)],
    }[case]
    assert pixels(picture(runs, dark=True))[0] == 1800


def test_json_is_strict_and_whole(written):
    def refuse(name):
        raise AssertionError(name)

    found = json.loads((written[1] / "results.json").read_text(), parse_constant=refuse)
    assert found["runs"] == written[2]
    assert found["sentence"] == sentence(summarize(written[2]))
    assert [row["counted"] for row in found["rows"]] == [3, 3, 0, 3, 1]


def test_write_leaves_nothing_else(written):
    assert sorted(p.name for p in written[1].iterdir()) == ["curves.png", "report.html", "results.json"]


def test_without_matplotlib_the_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'streamnorm\[cli\]'"):
        write_report(CLEAR, tmp_path, "Title")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_matplotlib_is_imported_by_drawing_and_without_pyplot():
    code = f"""
import sys
from streamnorm.lab.runs.report import picture
assert "matplotlib" not in sys.modules
picture({[run("none", 0, 0.5, 0.4)]!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_training_returns_can_be_reported(tmp_path):
    """The shape of a record is agreed between ``loop`` and ``summary``; neither imports the other."""
    arms = {"none": {}, "batch": {"samples_per_batch": 1}, "layer": {"learning_rate": 1e30}}
    runs = [train(small(arm=arm, **changes), toy()) for arm, changes in arms.items()]
    write_report(runs, tmp_path, "Toy")
    none, batch, layer = summarize(runs)
    assert (none.failed, none.epochs) == (None, 2)
    assert batch.failed is not None
    assert batch.failed.startswith("could not train because ")
    assert "Setting A" in batch.failed
    assert layer.failed == "diverged"

"""The report of a comparison: its figures against ones computed by hand, its words, its picture and its files."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser

import pytest

from streamnorm.training import report

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


def epoch(number, train_loss, test_error, **more):
    base = {"updates": 44 * number, "samples": 1408 * number, "train_error": 0.3, "test_loss": 0.9, "seconds": 1.0}
    return {"epoch": number, "train_loss": train_loss, "test_error": test_error, **base, **more}


def run(arm, seed, *errors, label=None, failed=None, **more):
    """A run whose epoch k has the k-th of ``errors`` and training loss 1 / k."""
    return {
        "arm": arm,
        "label": label or f"{arm} 1 S/B x 32 B/U",
        "seed": seed,
        "run": {"arm": arm, "lr": 0.1, "seed": seed, "widths": [32, 64]},
        "data": "digits",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "some cpu", "threads": 2},
        "metrics": [epoch(k, 1 / k, error) for k, error in enumerate(errors, 1)],
        "failed": failed,
        **more,
    }


def runs_of(arm, *finals, **more):
    return [run(arm, seed, 0.5, final, **more) for seed, final in enumerate(finals)]


REFUSED = "batch normalization refuses one sample per batch."
CLEAR = [
    *runs_of("none", 0.060, 0.061, 0.062),
    *runs_of("streaming", 0.039, 0.042, 0.045),
    *[run("batch", seed, failed=REFUSED) for seed in range(3)],
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs = [
        *CLEAR,
        *runs_of("evil", 0.1, 0.2, 0.3, label='<script>alert("1 & 2")</script> $x^2$ _'),
        *runs_of("layer", 0.05, math.nan, None, label="layer|norm"),
    ]
    folder = tmp_path_factory.mktemp("out") / "deep" / "er"
    path = report.write_report(runs, folder, "Which <b>learns</b> & $why$?")
    return path, folder, runs


# ---------------------------------------------------------------------------------------------------- figures


def test_rows_against_hand_computed_figures():
    none, streaming, batch = report.summarize(CLEAR)
    assert [r.label.split()[0] for r in (none, streaming, batch)] == ["none", "streaming", "batch"]
    assert streaming.seeds == (0, 1, 2)
    assert streaming.test_error == pytest.approx(0.042)
    assert streaming.test_error_sd == pytest.approx(0.003)  # sqrt((0.003^2 + 0 + 0.003^2) / 2)
    assert (streaming.train_loss, streaming.train_loss_sd) == (0.5, 0.0)
    assert streaming.best_test_error == 0.039
    assert streaming.reference == none.label
    assert streaming.difference == pytest.approx(-0.019)
    assert streaming.difference_sd == pytest.approx(0.002)  # of -0.021, -0.019, -0.017
    assert (streaming.pairs, streaming.epochs, streaming.failed) == (3, (2, 2), None)
    assert none.difference is None
    assert (batch.test_error, batch.best_test_error, batch.seconds, batch.epochs) == (None,) * 4
    assert batch.failed == REFUSED.rstrip(".")


def test_lowest_error_may_be_of_an_earlier_epoch_and_seconds_are_a_median():
    a = run("none", 0, 0.2, 0.1, 0.3)
    for metrics, seconds in zip(a["metrics"], (1.0, 9.0, 2.0), strict=True):
        metrics["seconds"] = seconds
    (row,) = report.summarize([a])
    assert (row.best_test_error, row.test_error, row.seconds) == (0.1, 0.3, 2.0)
    assert row.test_error_sd is None


def test_pairs_are_of_the_seeds_that_both_have():
    runs = [run("none", s, e) for s, e in ((0, 0.5), (1, 0.4), (3, 0.9))]
    runs += [run("layer", s, e) for s, e in ((1, 0.1), (0, 0.3), (2, 0.0))]
    row = report.summarize(runs)[1]
    assert row.pairs == 2
    assert row.difference == pytest.approx(-0.25)  # of 0.3 - 0.5 and 0.1 - 0.4
    assert row.difference_sd == pytest.approx(0.05 * math.sqrt(2))
    assert "(2 seeds)" in report.table(report.summarize(runs))


def test_pairs_are_taken_at_the_last_epoch_of_both():
    _, row = report.summarize([run("none", 0, 0.5, 0.4, 0.3), run("layer", 0, 0.45, 0.2)])
    assert row.difference == pytest.approx(0.2 - 0.4)


@pytest.mark.parametrize("bad", [math.nan, None, math.inf])
def test_a_diverged_seed_is_told_of_and_not_averaged(bad):
    runs = [*runs_of("none", 0.5, 0.5), run("layer", 0, 0.3, 0.1), run("layer", 1, 0.3, bad)]
    row = report.summarize(runs)[1]
    assert (row.diverged, row.counted, row.test_error, row.test_error_sd) == ((1,), 1, 0.1, None)
    assert row.difference == pytest.approx(-0.4)
    assert row.best_test_error == 0.1
    said = report.sentence(report.summarize(runs))
    assert "layer normalization (10.0 %, 1 seed) diverged with seed 1" in said
    assert "best" not in said, "the mean of the seeds that are left must not win"
    assert "**layer" not in report.table(report.summarize(runs))


def test_a_finite_error_behind_a_loss_of_nan_is_counted_and_marked():
    a = run("none", 0, 0.9)
    a["metrics"][0]["train_loss"] = math.nan
    (row,) = report.summarize([a])
    assert (row.test_error, row.train_loss, row.diverged) == (0.9, None, (0,))
    assert "diverged" in report.sentence([row])


def test_the_reference_is_a_label_that_trained():
    runs = [run("none", 0, failed="no memory"), run("layer", 0, 0.3), run("batch", 0, 0.2)]
    rows = report.summarize(runs)
    assert {r.reference for r in rows} == {"layer 1 S/B x 32 B/U"}
    assert rows[2].difference == pytest.approx(-0.1)


# ------------------------------------------------------------------------------------------------------ words


def test_sentence_of_a_clear_winner_and_a_failed_arm():
    assert report.sentence(report.summarize(CLEAR)) == (
        "At 1 sample a batch and 32 batches an update, streaming normalization was best with 4.2 % test error "
        "(sd 0.3, 3 seeds), ahead of no normalization with 6.1 % (sd 0.1), while batch normalization could not train "
        "(batch normalization refuses one sample per batch)."
    )


def test_sentence_says_level_when_the_spread_is_larger_than_the_difference():
    runs = [*runs_of("layer", 0.041, 0.043), *runs_of("streaming", 0.030, 0.050), *runs_of("none", 0.2, 0.2)]
    said = report.sentence(report.summarize(runs))
    assert "streaming normalization (4.0 % test error, sd 1.4, 2 seeds) and layer normalization (4.2 %, sd 0.1)" in said
    assert "were level, ahead of no normalization with 20.0 %" in said
    assert "best" not in said
    bold = [line for line in report.table(report.summarize(runs)).splitlines() if "**" in line]
    assert len(bold) == 2


def test_sentence_does_not_call_the_lowest_of_single_seeds_best():
    said = report.sentence(report.summarize([run("none", 0, 0.2), run("layer", 0, 0.1)]))
    assert "layer normalization was lowest, with no spread to judge it by, at 10.0 % test error (1 seed)" in said
    assert "best" not in said


def test_sentence_of_equal_errors_is_level():
    assert "were level" in report.sentence(report.summarize([run("none", 0, 0.2), run("layer", 0, 0.2)]))


def test_sentence_of_one_arm_names_no_winner():
    said = report.sentence(report.summarize(runs_of("none", 0.2, 0.3, label="plain")))
    assert said == "No normalization reached 25.0 % test error (sd 7.1, 2 seeds)."


def test_sentence_takes_labels_when_the_settings_differ():
    runs = [*runs_of("layer", 0.1, 0.1), *runs_of("layer", 0.3, 0.3, label="layer 32 S/B x 1 B/U")]
    said = report.sentence(report.summarize(runs))
    assert said.startswith("Layer 1 S/B x 32 B/U was best")
    assert "layer 32 S/B x 1 B/U with 30.0 %" in said


def test_sentence_when_nothing_trained():
    runs = [run("batch", 0, failed="one sample"), run("none", 0, failed="one sample")]
    said = report.sentence(report.summarize(runs))
    assert said.endswith("batch normalization and no normalization could not train (one sample).")


def test_sentence_tells_of_runs_of_unequal_length():
    runs = [run("none", 0, 0.3, 0.2, 0.1), run("layer", 0, 0.3)]
    assert report.sentence(report.summarize(runs)).endswith("; the runs differ in length (1 to 3 epochs).")
    assert "ended at epoch 1 of 3" in report.table(report.summarize(runs))


def test_table_is_markdown_with_units():
    lines = report.table(report.summarize(CLEAR)).splitlines()
    assert len(lines) == 5
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "Test error (%)" in lines[0]
    assert "(nats)" in lines[0]
    assert "**4.2 ± 0.3**" in lines[3]
    assert "\N{MINUS SIGN}1.9 ± 0.2" in lines[3]
    assert "could not train (batch normalization refuses one sample per batch)" in lines[4]


def test_small_errors_get_a_second_decimal():
    assert "0.81 % test error (sd 0.02" in report.sentence(report.summarize(runs_of("none", 0.0079, 0.0081, 0.0083)))


# ------------------------------------------------------------------------------------------------------ files


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
    assert report.sentence(report.summarize(runs)) in shown.replace("\N{NO-BREAK SPACE}", " ")
    for words in ("could not train", "[32, 64]", "some cpu", "2.13.0", "0, 1, 2", "diverged with seeds 1 and 2"):
        assert words in shown
    assert shown.count("[32, 64]") == 1, "what all runs share is shown once"
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
    assert 700 < height < 2000
    assert len(raw) == height * (1 + 4 * width)
    assert 20_000 < len(png) < 1_000_000


@pytest.mark.parametrize("case", ["one epoch", "nothing trained", "all nan", "zero loss"])
def test_picture_of_odd_runs(case, tmp_path):
    runs = {
        "one epoch": [run("none", 0, 0.3)],
        "nothing trained": [run("none", 0, failed="no memory")],
        "all nan": [run("none", 0, math.nan, metrics=[epoch(1, math.nan, None)])],
        "zero loss": [run("none", 0, metrics=[epoch(1, 0.0, 0.0), epoch(2, 1e30, 0.9)])],
    }[case]
    path = report.curves(runs, tmp_path / "x.png", "Odd", dark=True)
    assert pixels(path.read_bytes())[0] == 1800


def test_json_is_strict_and_whole(written):
    def refuse(name):
        raise AssertionError(name)

    found = json.loads((written[1] / "results.json").read_text(), parse_constant=refuse)
    assert len(found["runs"]) == len(written[2])
    assert len(found["rows"]) == 5
    assert found["runs"][-2]["metrics"][-1]["test_error"] is None
    assert report.summarize(found["runs"]) == report.summarize(written[2])


def test_write_leaves_nothing_else(written):
    assert sorted(p.name for p in written[1].iterdir()) == ["curves.png", "report.html", "results.json"]


def test_a_write_that_fails_keeps_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.curves(CLEAR, path, "Title")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == b"old"


def test_without_matplotlib_the_results_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'streamnorm\[cli\]'"):
        report.write_report(CLEAR, tmp_path, "Title")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_importing_takes_the_standard_library_alone_and_drawing_leaves_pyplot_alone(tmp_path):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("report", {report.__file__!r})
sys.modules["report"] = report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
assert not {{"torch", "numpy", "matplotlib"}} & set(sys.modules)
report.curves({[run("none", 0, 0.5, 0.4)]!r}, {str(tmp_path / "x.png")!r}, "Title")
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "give one dict per arm and seed"),
        ({"arm": "none"}, "give one dict per arm and seed"),
        (["none"], r"runs\[0\] is 'none'"),
        ([{"arm": "none", "seed": 0}], "a run is a dict with arm, label, seed"),
        ([run("none", 0)], "no metrics.*'failed'"),
        ([run("none", 0, metrics=[{"epoch": 1, "train_loss": 1.0}])], "'test_error' a number"),
        ([run("none", 0, metrics=[None])], "'test_error' a number"),
        ([run("none", 0, metrics=[epoch(1, "low", 0.5)])], "'test_error' a number"),
        ([run("none", 0, metrics=[epoch(2, 1.0, 0.5), epoch(2, 1.0, 0.5)])], "growing whole 'epoch'"),
        ([run("none", 0, 0.5), run("none", 0, 0.5)], "came twice"),
        ([run("none", 0, 0.5, label="x"), run("layer", 1, 0.5, label="x")], "two labels"),
        ([run("none", 0, 0.5), run("none", 1, 0.5, data="mnist")], "'mnist', runs.0. 'digits'"),
    ],
)
def test_bad_input_says_what_came_and_how_to_mend_it(runs, words):
    with pytest.raises(ValueError, match=words):
        report.summarize(runs)


def test_sentence_of_nothing():
    with pytest.raises(ValueError, match="summarize"):
        report.sentence([])

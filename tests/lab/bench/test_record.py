"""The record: tables, pictures and verdicts."""

from __future__ import annotations

import re
from functools import partial

import pytest

from benchmarks import ASKED, FACTS, Idle, fill, work
from streamnorm.lab.bench.case import Case, Variant
from streamnorm.lab.bench.journal import Journal
from streamnorm.lab.bench.record import sentences, write_record
from streamnorm.lab.bench.results import curves, median_ratio, rows, totals, verdicts

PNG = b"\x89PNG\r\n"


def test_results_are_medians_of_the_same_rounds(journal: Journal) -> None:
    fill(journal)
    cases = journal.cases()
    first = cases[0]
    full = rows(first)[0]
    assert (full.variant, full.is_ours, full.seconds, full.ratio) == ("full", True, 1.0, (0.5, 0.5, 0.5))
    assert full.forward == pytest.approx(0.2)
    assert full.backward == pytest.approx(0.8)
    assert full.floor == pytest.approx((1e10 / (5 << 20), 1e10 * 4 / 3 / (7 << 20)))
    assert median_ratio(first, "full", "nn.LayerNorm") == 2.0
    mine = [case for case in cases if case.allocator == "tuned"]
    assert [(t.variant, t.mean, t.worst) for t in totals(mine[:1])] == [
        *(("full", 0.5, 0.5), ("one-pass", 0.2, 0.2), ("nn.LayerNorm", 0.25, 0.25)),
    ]
    judged = [(t.group, t.variant, t.reference, total.mean, met) for t, total, met in verdicts(mine)]
    assert judged == [
        ("contiguous", "full", "nn.BatchNorm2d", 0.5, False),
        ("contiguous", "one-pass", "nn.BatchNorm2d", 0.2, True),
        ("features", "full", "nn.BatchNorm1d", 0.5, True),
        ("features", "one-pass", "nn.BatchNorm1d", 0.2, True),
        ("features", "full", "nn.LayerNorm", 2.0, False),
    ]
    assert {(c.variant, c.exponent, c.low, c.high) for c in curves(mine)} == {
        ("full", 1.5, 4, 8),
        ("nn.BatchNorm2d", 1.5, 4, 8),
    }


def test_record_has_tables_and_pictures(journal: Journal) -> None:
    fill(journal)
    path = write_record(journal)
    text = path.read_text()
    assert path.name == "2026-01-31-some-cpu.md"
    assert "| processor | some cpu |" in text
    assert "peak MB" not in text
    assert "| contiguous | full | nn.BatchNorm2d | 0.50 | 0.50 | ≤ 0.35, worst ≤ 0.60 | **missed** |" in text
    assert "| full | 1,000,000 | 0.50 | [0.50, 0.50] | 0.20 | 0.80 | 5 (7) | 1907.3 (1816.5) |" in text
    assert "| exponent | 1.50 (4 to 8) | 1.50 (4 to 8) |" in text
    assert text.count("### ") == 6, "a table each way to keep memory"
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [image.rpartition("-")[2] for image in images] == ["contiguous.png", "features.png", "growth.png"]
    assert all((path.parent / image).read_bytes().startswith(PNG) for image in images)
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert sentences(journal)[0] == (
        "contiguous, full, to nn.BatchNorm2d, mean 0.50, worst 0.50, target ≤ 0.35, worst ≤ 0.60, missed"
    )


def test_other_thread_counts_are_not_judged(journal: Journal) -> None:
    journal.start({**ASKED, "threads": 1}, FACTS)
    fill(journal)
    text = write_record(journal).read_text()
    assert "missed" not in text
    assert "nothing is judged by this run" in text
    assert not sentences(journal)


def test_a_run_on_a_device_is_not_judged_and_names_it(journal: Journal) -> None:
    journal.start({**ASKED, "device": "cuda"}, {"device": "some GPU, 16 GB", "CUDA": "12.9", **FACTS})
    fill(journal)
    text = write_record(journal).read_text()
    assert "| device | some GPU, 16 GB |\n| CUDA | 12.9 |" in text
    assert "Layers, inputs and gradients are on the device" in text
    assert "glibc" not in text
    assert "missed" not in text
    assert not sentences(journal)


def test_memory_stands_in_the_record_and_is_judged(journal: Journal) -> None:
    sizes = {"default": 1_500_000, "nn.BatchNorm2d": 1_000_000}
    variants = {
        name: Variant(partial(Idle, name, []), None if "nn" in name else (lambda: None), peak=partial(int, size))
        for name, size in sizes.items()
    }
    work([Case("resnet", "tiny", "nn.BatchNorm2d", variants)], journal, "tuned", 1)
    case = journal.cases()[0]
    assert case.peaks == sizes
    judged = [(t.of, round(total.mean, 6), met) for t, total, met in verdicts([case]) if t.of == "peak"]
    assert judged == [("peak", 1.5, False)]
    text = write_record(journal).read_text()
    assert re.search(r"\| floor \| peak MB \|\n.*\n\| default \|.*\| 1\.5 \|\n", text)
    assert "| resnet | default | nn.BatchNorm2d | 1.50 | 1.50 | ≤ 1.00, peak memory | **missed** |" in text

"""Records are read as they were written, and Table 1 and the page say what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamnorm.lab.studies.overview import overview
from streamnorm.lab.studies.recorded import APPROACHES, COLUMNS, PAPER, Recorded, agreement, read, read_all, table_1

TEXT = """# A network, tier reduced

Data: some. folder x

Versions: torch 2. Machine: cpu Y.

| claim | verdict | figures |
|---|---|---|
| C-01: It <works>. | **partly** | 1 of 2 |

| Arm | Seeds | Test error (%) | Lowest (%) |
| :--- | ---: | ---: | ---: |
| **batch 64 x 1** | **3** | **45.10 ± 0.14** | 45.00 |
| layer 64 x 1 (1 of 3 seeds failed) | 2 of 3 | 46.26 ± 0.33 | 45.88 |
| batch 1 x 64 | 0 of 3 | — | — |

![Curves](2026-01-02-online.png)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "2026-01-02-online.md").write_text(TEXT)
    (tmp_path / "2026-01-02-online.png").write_bytes(b"PNG")
    (tmp_path / "README.md").write_text("# no record\n")
    return tmp_path


def test_a_record_is_read_again(folder: Path) -> None:
    (record,) = read_all(folder)
    assert (record.name, record.title) == ("online", "A network, tier reduced")
    assert record.opening == ("Data: some. folder x", "Versions: torch 2. Machine: cpu Y.")
    assert record.claims == (("C-01: It <works>.", "partly", "1 of 2"),)
    assert record.figures["batch 64 x 1"] == 45.10
    assert record.figures["layer 64 x 1"] == 46.26
    assert record.figures["batch 1 x 64"] is None
    assert [path.name for path in record.pictures] == ["2026-01-02-online.png"]


def test_a_folder_without_records_and_a_file_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no record of a study"):
        read_all(tmp_path)
    (tmp_path / "x.md").write_text("words")
    with pytest.raises(ValueError, match="is no record of a study"):
        read(tmp_path / "x.md")


def recorded(study: str, **figures: float | None) -> Recorded:
    return Recorded(Path(f"2026-01-02-{study}.md"), "", (), (), figures, ())


def test_table_1_is_the_papers_where_the_records_say_so() -> None:
    value = {"works": 40.0, "behind": 60.0, "fails": 90.0}
    of: dict[str, dict[str, float | None]] = {}
    for i, column in enumerate(COLUMNS):
        for run, line in zip(column.runs, PAPER, strict=True):
            unit = 1.0 if column.margin >= 1 else 0.04
            of.setdefault(column.study, {}).setdefault(run, value[line[i]] * unit)
    ours = table_1([recorded(study, **figures) for study, figures in of.items()])
    assert agreement(ours) == (28, 28)
    of["online"]["streaming 1 x 64"] = None
    ours = table_1([recorded(study, **figures) for study, figures in of.items()])
    assert agreement(ours) == (26, 28), "its own cell, and all combined"
    assert ours[3][4][0] == ours[3][6][0] == "fails"


def test_what_no_record_holds_is_unknown() -> None:
    ours = table_1([recorded("online", **{"batch 64 x 1": 45.0})])
    assert ours[0][0] == ("works", 45.0)
    assert ours[2][0][0] == ours[2][6][0] == "unknown"
    assert len(ours) == len(APPROACHES)


def test_the_page_holds_everything_and_needs_no_other_file(folder: Path) -> None:
    page = overview(folder)
    assert "C-01: It &lt;works&gt;." in page
    assert "data:image/png;base64,UE5H" in page
    assert "cpu Y" in page
    assert "works (45.1)" in page
    assert "http" not in page
    assert 'src="2026' not in page

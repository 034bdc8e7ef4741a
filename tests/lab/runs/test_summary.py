"""What the records of runs say: figures against ones computed by hand, words, the table."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from records import CLEAR, REFUSED, run, runs_of

from streamnorm.lab.runs import summary
from streamnorm.lab.runs.summary import fixed, listed, sentence, summarize, table


def said(runs):
    return sentence(summarize(runs))


def test_rows_against_hand_computed_figures():
    none, streaming, batch = summarize(CLEAR)
    assert [row.arm for row in (none, streaming, batch)] == ["none", "streaming", "batch"]
    assert streaming.seeds == (0, 1, 2)
    assert streaming.test_error == pytest.approx(0.042)
    assert streaming.test_error_sd == pytest.approx(0.003)  # sqrt((0.003^2 + 0 + 0.003^2) / 2)
    assert (streaming.train_loss, streaming.train_loss_sd) == (0.5, 0.0)
    assert streaming.best_test_error == 0.039
    assert streaming.reference == none.label
    assert streaming.difference == pytest.approx(-0.019)
    assert streaming.difference_sd == pytest.approx(0.002)  # of -0.021, -0.019, -0.017
    assert (streaming.pairs, streaming.counted, streaming.epochs, streaming.failed) == (3, 3, 2, None)
    assert none.difference is None
    assert (batch.test_error, batch.best_test_error, batch.seconds_per_epoch, batch.epochs) == (None,) * 4
    assert (batch.counted, batch.failed) == (0, f"could not train because {REFUSED}")


def test_lowest_error_may_be_of_an_earlier_epoch_and_seconds_are_a_median():
    a = run("none", 0, 0.2, 0.1, 0.3)
    for metrics, seconds in zip(a["metrics"], (1.0, 9.0, 2.0), strict=True):
        metrics["seconds"] = seconds
    (row,) = summarize([a])
    assert (row.best_test_error, row.test_error, row.seconds_per_epoch) == (0.1, 0.3, 2.0)
    assert row.test_error_sd is None


def test_pairs_are_of_the_seeds_that_both_have():
    runs = [run("none", s, e) for s, e in ((0, 0.5), (1, 0.4), (3, 0.9))]
    runs += [run("layer", s, e) for s, e in ((1, 0.1), (0, 0.3), (2, 0.0))]
    row = summarize(runs)[1]
    assert row.pairs == 2
    assert row.difference == pytest.approx(-0.25)  # of 0.3 - 0.5 and 0.1 - 0.4
    assert row.difference_sd == pytest.approx(0.05 * math.sqrt(2))
    assert "(2 seeds)" in table(summarize(runs))


def test_pairs_are_taken_at_the_last_epoch_of_both():
    _, row = summarize([run("none", 0, 0.5, 0.4, 0.3), run("layer", 0, 0.45, 0.2)])
    assert row.difference == pytest.approx(0.2 - 0.4)


def test_a_lost_seed_is_told_of_and_not_averaged():
    lost = run("layer", 1, 0.3, failed="diverged: the loss became nan at update 50")
    runs = [*runs_of("none", 0.5, 0.5), run("layer", 0, 0.3, 0.1), lost]
    row = summarize(runs)[1]
    assert (row.failed, row.counted, row.test_error, row.test_error_sd) == ("diverged (seed 1)", 1, 0.1, None)
    assert row.difference == pytest.approx(-0.4)
    assert said(runs).endswith(
        "no normalization (50.00 ± 0.00 % test error, mean ± sd over 2 seeds) trained to the end, "
        "while layer normalization (10.00 %, 1 seed) diverged (seed 1)."
    )
    assert "**layer" not in table(summarize(runs)), "the mean of the seeds that are left must not win"


def test_seeds_are_lost_for_different_reasons():
    reasons = ["diverged: at update 3", "no room", "diverged: at update 9", None]
    (row,) = summarize([run("none", seed, 0.5, failed=reason) for seed, reason in enumerate(reasons)])
    assert row.failed == "diverged (seeds 0 and 2) and could not train because no room (seed 1)"


def test_the_reference_is_a_label_that_trained():
    rows = summarize([run("none", 0, failed="no room"), run("layer", 0, 0.3), run("batch", 0, 0.2)])
    assert {row.reference for row in rows} == {"layer 1 S/B x 32 B/U"}
    assert rows[2].difference == pytest.approx(-0.1)


# ------------------------------------------------------------------------------------------------------ words


def test_sentence_of_a_clear_winner_and_a_failed_arm():
    assert said(CLEAR) == (
        "At 1 sample a batch and 32 batches an update, streaming normalization (4.20 ± 0.30 % test error, mean ± sd "
        "over 3 seeds) was best; higher than the lowest by more than the spread: no normalization (6.10 ± 0.10 %), "
        "while batch normalization could not train "
        "because one activation in each reference gives sigma = 0."
    )


def test_sentence_says_level_when_the_spread_is_larger_than_the_difference():
    runs = [*runs_of("layer", 0.041, 0.043), *runs_of("streaming", 0.030, 0.050), *runs_of("none", 0.2, 0.2)]
    assert said(runs).endswith(
        "streaming normalization (4.00 ± 1.41 % test error, mean ± sd over 2 seeds) and layer normalization "
        "(4.20 ± 0.14 %) were level; higher than the lowest by more than the spread: no normalization (20.00 ± 0.00 %)."
    )
    assert len([line for line in table(summarize(runs)).splitlines() if "**" in line]) == 2


def test_sentence_does_not_call_the_lowest_of_single_seeds_best():
    assert said([run("none", 0, 0.2), run("layer", 0, 0.1)]).endswith(
        "layer normalization (10.00 % test error, 1 seed) was lowest, of too few seeds to rank by (1); "
        "higher: no normalization (20.00 %)."
    )


def test_sentence_of_equal_errors_is_level():
    assert "were level" in said([run("none", 0, 0.2), run("layer", 0, 0.2)])


def test_sentence_of_one_arm_names_no_winner():
    found = said(runs_of("none", 0.2, 0.3, label="plain"))
    assert found == "Plain (25.00 ± 7.07 % test error, mean ± sd over 2 seeds) trained to the end."


@pytest.mark.parametrize("other", ["layer 32 S/B x 1 B/U", "layer, another name"])
def test_sentence_takes_labels_when_the_settings_differ(other):
    found = said([*runs_of("layer", 0.1, 0.1), *runs_of("layer", 0.3, 0.3, label=other)])
    assert found.startswith("Layer 1 S/B x 32 B/U (10.00")
    assert f"more than the spread: {other} (30.00" in found


def test_sentence_when_nothing_trained():
    runs = [run("batch", 0, failed=REFUSED), run("none", 0, failed=REFUSED)]
    assert said(runs).endswith(f"batch normalization and no normalization could not train because {REFUSED}.")
    assert "Difference to reference" in table(summarize(runs))


def test_sentence_tells_of_runs_of_unequal_length():
    runs = [run("none", 0, 0.3, 0.2, 0.1), run("layer", 0, 0.3)]
    assert said(runs).endswith("; the runs differ in length (1 to 3 epochs).")
    assert "ended at epoch 1 of 3" in table(summarize(runs))


def test_a_long_list_is_cut():
    assert listed("abcde") == "a, b, c, d and e"
    assert listed("abcdef") == "a, b, c, d and 2 others"
    assert listed("a") == "a"


def test_table_is_markdown_with_units():
    lines = table(summarize(CLEAR)).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "Test error (%)" in lines[0]
    assert "(nats)" in lines[0]
    assert "**4.20 ± 0.30**" in lines[3]
    assert "\N{MINUS SIGN}1.90 ± 0.20" in lines[3]
    assert f"could not train because {REFUSED}" in lines[4]


def test_numbers():
    assert fixed(None) == "\N{EM DASH}"
    assert fixed(-1e-9, sign="+") == "+0.00", "no negative zero"
    assert fixed(12345678.0, unit=1) == "1.23e+07"


# -------------------------------------------------------------------------------------------------- bad input


def test_no_runs_and_a_seed_that_came_twice_are_refused():
    with pytest.raises(ValueError, match="at least one arm and one seed"):
        summarize([])
    with pytest.raises(ValueError, match=r"'none 1 S/B x 32 B/U' came with seeds \[0, 0\]"):
        summarize([run("none", 0, 0.5), run("none", 0, 0.5)])


def test_importing_takes_the_standard_library_alone():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("summary", {summary.__file__!r})
sys.modules["summary"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["summary"])
assert not {{"streamnorm", "torch", "numpy", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

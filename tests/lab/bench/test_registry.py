"""The cases: every target is measured, and what cannot be is left out with a line."""

from __future__ import annotations

import pytest

from benchmarks import Idle
from streamnorm.lab.bench import registry
from streamnorm.lab.bench.case import Case, Shared, Variant
from streamnorm.lab.bench.targets import TARGETS


@pytest.mark.parametrize("quick", [True, False])
def test_registry_is_well_formed(quick: bool) -> None:
    cases = registry.cases(asked=registry.Asked(quick, compiled=True))
    assert {case.group for case in cases} == set(registry.GROUPS)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert any(variant.check for variant in case.variants.values()), (
            f"{case} has nothing of ours, or no gate for it"
        )
        assert case.variants[case.reference].check is None, f"{case}: the reference is another library's"
        assert len(case.variants) > 1
    series = [(case.series, case.size) for case in cases if case.series]
    assert series == sorted(series, key=lambda s: [t for t, _ in series].index(s[0]) * 1e6 + s[1]), "curves grow"
    curves = {"batch", "features", "map side", "cycle length", "time steps", "hidden size"}
    assert {name for name, _ in series} == curves


def test_every_target_is_measured() -> None:
    cases = registry.cases(asked=registry.Asked(compiled=True))
    for target in TARGETS:
        mine = [case for case in cases if case.group == target.group and target.cases in case.name]
        measured = [case for case in mine if {target.variant, target.reference} <= set(case.variants)]
        assert measured, target
        if target.of == "peak":
            assert all(case.variants[name].peak for case in measured for name in (target.variant, target.reference))


def test_tiny_cases_are_right_and_run() -> None:
    for case in registry.cases(asked=registry.Asked(quick=True)):
        if case.group != "growth" or case.size <= 4:
            case.gate()
            for variant in case.variants.values():
                with variant.within():
                    variant.make().step()


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'features'"):
        registry.cases(["feature"])


def test_a_case_needs_its_reference_and_its_place_on_a_curve() -> None:
    with pytest.raises(ValueError, match="the reference 'best' is none of"):
        Case("features", "one", "best", {"ours": Variant(lambda: Idle("", []))})
    with pytest.raises(ValueError, match="a point of a curve has a series and a size"):
        Case("growth", "one", "ours", {"ours": Variant(lambda: Idle("", []))}, series="batch")


def test_what_is_shared_lives_as_long_as_its_holders() -> None:
    class Value:
        pass

    made: list[int] = []
    shared = Shared(lambda: made.append(1) or Value())
    held = shared()
    assert shared() is held
    del held
    shared()
    assert len(made) == 2


def test_groups_are_left_out_with_a_line() -> None:
    groups = list(registry.GROUPS)
    slow, on_cpu = ["compiled", "resnet"], ["online", "cycle", "monitor"]
    names, lines = registry.chosen([], registry.Asked())
    assert names == [name for name in groups if name not in slow]
    assert lines == ["left out, takes minutes to compile: compiled, resnet (--compile, or --groups)"]
    assert registry.chosen([], registry.Asked(compiled=True)) == (groups, [])
    assert registry.chosen(["resnet"], registry.Asked()) == (["resnet"], [])
    names, lines = registry.chosen([], registry.Asked(compiled=True, device="cuda"))
    assert names == [name for name in groups if name not in on_cpu]
    assert lines == ["left out, of the CPU alone: online, cycle, monitor"]
    assert registry.chosen(["online", "single"], registry.Asked(device="cuda"))[0] == ["single"]
    with pytest.raises(ValueError, match="nothing is left to time on cuda; left out, of the CPU alone: online"):
        registry.chosen(["online"], registry.Asked(device="cuda"))

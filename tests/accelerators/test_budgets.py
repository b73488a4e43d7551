"""Every program stays within its budget on accelerators that this machine need not have."""

import _budgets
import _programs
import _targets
import _worker
import pytest

from tests.registry import RECIPES


PROGRAMS = _programs.programs()
CASES = [
    pytest.param(
        target,
        name,
        marks=() if target == "v5e" and name in _programs.QUICK else pytest.mark.slow,
        id=f"{target}-{name}",
    )
    for target in _targets.COMPILERS
    for name in PROGRAMS
]


@pytest.fixture(scope="module")
def workers():
    """A process for each kind of device, started by the first who asks it."""
    found = {target: _worker.Worker(target) for target in _targets.COMPILERS}
    yield found
    for worker in found.values():
        worker.close()


@pytest.mark.accelerator
@pytest.mark.parametrize(("target", "name"), CASES)
def test_a_program_stays_within_its_budget(target, name, workers):
    if absent := _targets.missing(target):
        pytest.skip(absent)
    budgets = _budgets.load()[target]
    same = budgets["versions"] == _targets.versions(target)
    found = workers[target].measure(name)
    broken = _budgets.exceeded(budgets["programs"][name], found, same)
    assert not broken, f"{target}, {name}: {'; '.join(broken)}"


@pytest.mark.parametrize("target", _targets.COMPILERS)
def test_every_program_has_a_budget_and_every_budget_a_program(target):
    lower = "run: python benchmarks/accelerators.py --lower"
    assert {*_budgets.load()[target]["programs"]} == {*PROGRAMS}, lower


def test_every_recipe_has_a_program():
    assert {*_programs.recipes()} <= {*PROGRAMS}
    assert {*_programs.QUICK} <= {*PROGRAMS}
    kinds = {"pairs": _programs.OF_PAIRS, "svd": _programs.OF_SVD_FORMS}
    for kind, named in kinds.items():
        assert named == {n.split("(")[0] for n, e in RECIPES.items() if e.params == kind}


def measured(**changes):
    """What is found of a program that sends something."""
    counts = dict.fromkeys(_budgets.COUNTS, 8)
    sent = {"sent": {"all-reduce": 5, "all-gather": 3}, "branch_sent": {}}
    return {**counts, **sent, "compile_seconds": 2.0, "traffic": 1, **changes}


@pytest.fixture
def budget():
    return _budgets.amounts(measured())


def test_collectives_of_all_kinds_count_together(budget):
    assert budget["sent"] == 8
    assert budget["branch_sent"] == 0


@pytest.mark.parametrize("amount", _budgets.COUNTS)
def test_one_more_than_the_budget_breaks_it(amount, budget):
    assert not _budgets.exceeded(budget, measured())
    more = {"some": budget[amount] + 1} if amount.endswith("sent") else 9
    (sentence,) = _budgets.exceeded(budget, measured(**{amount: more}))
    assert sentence.startswith(f"{amount} {budget[amount] + 1} where {budget[amount]} are")


def test_another_compiler_may_need_half_as_much_again(budget):
    assert not _budgets.exceeded(budget, measured(kernels=22), same_versions=False)
    assert _budgets.exceeded(budget, measured(kernels=23), same_versions=False)
    assert _budgets.exceeded(budget, measured(kernels=22), same_versions=True)


def test_seconds_have_room_for_slow_processors(budget):
    assert not _budgets.exceeded(budget, measured(compile_seconds=8.0))
    assert _budgets.exceeded(budget, measured(compile_seconds=8.1))


def test_what_does_not_compile_is_over_budget(budget):
    (sentence,) = _budgets.exceeded(budget, {"failed": "out of memory"})
    assert sentence == "it does not compile: out of memory"


VERSIONS = {"jax": "1", "compiler": "2"}


def lowered(found, programs, versions=VERSIONS):
    own = {"versions": VERSIONS, "programs": programs}
    return _budgets.lower(own, found, versions, ["step", "new", "fails"])["programs"]


def test_a_budget_is_lowered_where_it_was_beaten_and_never_raised(budget):
    found = measured(kernels=7, code_bytes=9, compile_seconds=1.9)
    (after,) = lowered({"step": found}, {"step": budget}).values()
    assert after == {**budget, "kernels": 7}
    (after,) = lowered({"step": measured(compile_seconds=1.0)}, {"step": budget}).values()
    assert after == {**budget, "compile_seconds": 1.0}


def test_programs_come_go_and_fail(budget):
    found = {"new": measured(kernels=3), "fails": {"failed": "a reason"}}
    after = lowered(found, {"gone": budget, "fails": {**budget, "kernels": 2}})
    assert after == {"new": {**budget, "kernels": 3}, "fails": {**budget, "kernels": 2}}
    assert lowered({"fails": {"failed": "a reason"}}, {}) == {}


def test_what_was_not_measured_keeps_its_budget(budget):
    after = lowered({"new": measured()}, {"step": {**budget, "kernels": 99}})
    assert after == {"new": budget, "step": {**budget, "kernels": 99}}


def test_another_compiler_gets_budgets_of_its_own(budget):
    found = {"step": measured(kernels=20)}
    assert lowered(found, {"step": budget}, {"jax": "3"})["step"]["kernels"] == 20
    assert lowered(found, {"step": budget})["step"]["kernels"] == 8


def test_budgets_are_read_as_they_were_written(budget, tmp_path, monkeypatch):
    monkeypatch.setattr(_budgets, "PATH", tmp_path / "budgets.json")
    assert _budgets.load() == {}
    own = {"versions": VERSIONS, "programs": {"one": budget, "two": budget}}
    _budgets.save({"v5e": own, "h100": {**own, "programs": {"one": budget}}})
    assert _budgets.load() == {"v5e": own, "h100": {**own, "programs": {"one": budget}}}
    _budgets.save({"v5e": {"versions": VERSIONS, "programs": {}}})
    assert _budgets.load()["v5e"]["programs"] == {}

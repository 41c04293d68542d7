"""Structure against torch's own database of ops: nothing missed, and the page on it up to date."""

import numpy as np
import pytest
import torch

pytest.importorskip("expecttest", reason="the database of ops needs it")

from opinfo import COMPACT, COMPLETE, QUICK, Finding, database, findings, name_of
from opinfo_table import PAGE, line, lines_by_op, row
from pushforward.structure.rules.registry import RULES, without_derivative

aten = torch.ops.aten
PARTS = 8


def faults(found: list[Finding]) -> dict[str, tuple[list[str], set[str]]]:
    """What was missed, or could not be followed at all, by op and variant."""
    return {
        f"{f.op}, {f.variant}": (f.missed, f.unfollowed) for f in found if f.missed or f.unfollowed
    }


def op_named(name: str):
    return next(op for op in database() if name_of(op) == name)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_entry_is_missed_on_the_first_sample(part: int):
    for op in database()[part::PARTS]:
        assert faults(list(findings(op, QUICK))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_entry_is_missed_and_the_page_says_how_tight_each_op_is(part: int):
    committed = lines_by_op()
    same_torch = f"torch {torch.__version__.split('+')[0]}:" in PAGE.read_text(encoding="utf-8")
    for op in database()[part::PARTS]:
        found = list(findings(op, COMPACT))
        assert faults(found) == {}
        if same_torch:
            cells = row(found)
            assert committed.get(cells[0]) == line(cells), "run python tests/opinfo_table.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_entry_is_missed_on_any_sample(part: int):
    for op in database()[part::PARTS]:
        assert faults(list(findings(op, COMPLETE))) == {}


def test_the_page_has_all_ops_and_no_others():
    assert set(lines_by_op()) == {f"`{name_of(op)}`" for op in database()}


def verdicts(name: str) -> dict[str, str]:
    return {f.variant: f.verdict for f in findings(op_named(name), COMPACT)}


def test_a_rule_that_forgets_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def forgets(call):
        return [without_derivative(call.numbers(call.args[0]))]

    assert verdicts("cumsum")["plain"] == "exact"
    monkeypatch.setitem(RULES, aten.cumsum, forgets)
    assert verdicts("cumsum")["plain"] == "missed"


def test_a_rule_that_forgets_at_other_points_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def only_the_largest(call):
        numbers = call.numbers(call.args[0])
        return [np.asarray(numbers.reshape(-1)[int(call.args[0].argmax())])]

    assert verdicts("max (reduction_no_dim)")["plain"] == "exact"
    monkeypatch.setitem(RULES, aten.max, only_the_largest)
    assert verdicts("max (reduction_no_dim)")["plain"] == "missed"


def test_a_rule_that_exaggerates_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def everything(call):
        return call.same_everywhere(call.everything())

    assert verdicts("cumsum")["in place"] == "exact"
    monkeypatch.setitem(RULES, aten.cumsum, everything)
    assert verdicts("cumsum")["in place"] == "over"


def test_an_op_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(RULES, aten.cumsum)
    (plain, *_) = findings(op_named("cumsum"), COMPACT)
    assert (plain.verdict, plain.dense_ops) == ("dense", {"cumsum"})


def test_a_rule_that_breaks_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def breaks(call):
        raise IndexError("too far")

    monkeypatch.setitem(RULES, aten.cumsum, breaks)
    (plain, *_) = findings(op_named("cumsum"), COMPACT)
    assert plain.verdict == "not followed"
    assert any("IndexError: too far" in reason for reason in plain.unfollowed)

"""The gate: what it measures, what it lets pass, what it prints, writes and returns."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pushforward.cli import check as command
from pushforward.cli import main
from pushforward.cli.gate import LIMITS, judged, measured
from pushforward.cli.junit import Case, junit
from pushforward.cli.main import DEFECT, NOT_DIFFERENTIABLE, NOT_LOADED, USAGE
from pushforward.errors import DifferentiationError
from pushforward.report.data import DataSet

PASSED, FAILED = 0, 1
CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

class Scaled(nn.Module):
    '''Steps that multiply by 3, by 0.5 and by 1.'''
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.same = (nn.Linear(4, 4, bias=False) for _ in range(3))
        for layer, factor in ((self.wide, 3.0), (self.narrow, 0.5), (self.same, 1.0)):
            layer.weight.data = factor * torch.eye(4)

    def forward(self, x):
        return self.same(self.narrow(self.wide(x)))

class Thin(nn.Sequential):
    '''Three outputs of rank two: nothing is zero in its Jacobian but for rounding.'''
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 2), nn.Linear(2, 8), nn.Linear(8, 3))

class Deep(nn.Sequential):
    def __init__(self):
        layers = [nn.Linear(3, 3, bias=False) for _ in range(12)]
        for layer in layers:
            layer.weight.data = 2 * torch.eye(3)
        super().__init__(*layers)

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

class Talks(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        print("I am being built")

    def forward(self, x):
        print("I am being called")
        return super().forward(x)

class Coupled(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

class Root(nn.Module):
    def forward(self, x):
        return (x - x).sqrt() + x

class Blind(nn.Module):
    def forward(self, x):
        return x * 0

class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))

def named():
    return nn.Sequential(torch.nn.modules.container.OrderedDict([("a\\x1b[2J", nn.Linear(4, 4))]))
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with models and data."""
    (tmp_path / "nets.py").write_text(CODE)
    x = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20) % 3)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("nets", "_pushforward_user_"))]:
        del sys.modules[name]


def run(model: str, *words: str) -> int:
    return main(["check", f"nets.py:{model}", *words])


def outcome(capsys: pytest.CaptureFixture[str], model: str, *words: str) -> tuple[int, Any]:
    """The status, and the object on standard output."""
    status = run(model, *words, "--json")
    return status, json.loads(capsys.readouterr().out)


class TestValues:
    """Against matrices that are written down, and against autograd one sample at a time."""

    def test_gain_of_each_step(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, found = outcome(capsys, "Scaled", "--data", "d.npz", "--max-gain", "2.5")
        (limit,) = found["limits"]
        assert (status, found["passed"]) == (FAILED, False)
        assert limit["layers"] == pytest.approx({"wide": 3.0, "narrow": 0.5, "same": 2.0})
        assert (limit["layer"], limit["beyond"], limit["samples_beyond"]) == ("wide", ["wide"], 20)
        assert limit["value"] == pytest.approx(3.0)
        assert limit["times"] == pytest.approx(3 / 2.5)

    def test_smallest_gain(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, found = outcome(capsys, "Scaled", "--data", "d.npz", "--min-gain", "0.6")
        (limit,) = found["limits"]
        assert status == FAILED
        assert (limit["layer"], limit["beyond"]) == ("narrow", ["narrow"])
        assert limit["times"] == pytest.approx(0.6 / 0.5)
        assert run("Scaled", "--data", "d.npz", "--min-gain", "0.49") == PASSED

    def test_whole_map_on_the_worst_sample(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        limits = ("--max-norm", "9", "--max-spectral", "9", "--max-cond", "1e9", "--min-norm", "9")
        _, found = outcome(capsys, "net", "--data", "d.npz", *limits)
        x = torch.from_numpy(np.load(place / "d.npz")["x"]).double()
        model = sys.modules["_pushforward_user_nets"].net().double()
        matrices = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
        norms = matrices.flatten(1).norm(dim=1)
        expected = {
            "max-norm": norms,
            "min-norm": norms,
            "max-spectral": torch.linalg.matrix_norm(matrices, 2),
            "max-cond": torch.linalg.cond(matrices),
        }
        for limit in found["limits"]:
            values = expected[limit["name"]]
            worst = values.min() if limit["name"] == "min-norm" else values.max()
            assert limit["value"] == pytest.approx(worst.item(), rel=1e-4)
            assert values[limit["sample"]] == worst
            assert limit["layer"] is None
            assert limit["passed"] == (limit["name"] != "min-norm")

    def test_what_is_of_deficient_rank_has_no_condition(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, found = outcome(capsys, "Thin", "--input", "f32[6,4]", "--max-cond", "1e30")
        assert status == FAILED
        assert found["limits"][0]["value"] == "inf"

    def test_samples_are_numbered_as_in_the_data(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        x = np.zeros((50, 4), dtype=np.float32)
        x[:, 0] = 3 - np.arange(50) / 20  # tanh is steepest at the last one
        np.save(place / "line.npy", x)
        words = ("--data", "line.npy", "--samples", "20", "--max-norm", "0.1")
        _, found = outcome(capsys, "net", *words)
        assert found["data"] == {"name": "line.npy", "samples": 20, "size": 50}
        assert found["limits"][0]["sample"] > 20

    def test_layers_are_taken_together(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--data", "d.npz", "--max-gain", "9", "--layers", "narrow")
        _, found = outcome(capsys, "Scaled", *words)
        assert list(found["limits"][0]["layers"].values()) == pytest.approx([1.5, 2.0])

    def test_evaluation_mode(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Batch norm would couple samples, dropout would draw."""
        status, found = outcome(capsys, "Normed", "--data", "d.npz", "--max-gain", "99")
        again = outcome(capsys, "Normed", "--data", "d.npz", "--max-gain", "99")
        assert (status, found) == (PASSED, again[1])


class TestVerdict:
    def test_a_limit_that_is_met_exactly_holds(self) -> None:
        assert run("Scaled", "--data", "d.npz", "--max-gain", "3", "--min-gain", "0.5") == PASSED
        assert run("Scaled", "--data", "d.npz", "--max-gain", "2.9999") == FAILED
        assert run("Scaled", "--data", "d.npz", "--min-gain", "0.50005") == FAILED

    def test_every_limit_has_to_hold(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--data", "d.npz", "--max-gain", "9", "--max-norm", "1", "--max-cond", "2")
        status, found = outcome(capsys, "Scaled", *words)
        assert status == FAILED
        assert {limit["name"]: limit["passed"] for limit in found["limits"]} == {
            "max-gain": True,
            "max-norm": False,
            "max-cond": True,
        }

    def test_zero_jacobian(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Its gains and norm are 0, its condition is infinite; JSON stays strict."""
        words = ("--data", "d.npz", "--max-norm", "1", "--min-norm", "1e-9", "--max-cond", "1e30")
        status, found = outcome(capsys, "Blind", *words)
        values = {limit["name"]: limit["value"] for limit in found["limits"]}
        assert status == FAILED
        assert values == {"max-norm": 0.0, "min-norm": 0.0, "max-cond": "inf"}
        assert [limit["times"] for limit in found["limits"]] == [0.0, "inf", "inf"]

    def test_rounding_of_short_numbers_is_allowed_for(self) -> None:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
        data = DataSet("x", x, None, (0, 1, 2), 3)
        found = measured(nn.Linear(4, 4).bfloat16(), data, frozenset({"norm"}))
        assert found.slack == 1e-3

    def test_logarithms_do_not_overflow(self) -> None:
        found = command.Measured({"norm": {None: torch.tensor([800.0, -800.0])}}, (4, 7), (), 1e-9)
        high, low = judged(found, {"max-norm": 1e300, "min-norm": 1e-300})
        assert (high.value, high.sample, high.passed) == (math.inf, 4, False)
        assert (low.value, low.sample, low.passed) == (0.0, 7, False)

    def test_rounding_decides_nothing(self) -> None:
        """Of values that rounding alone tells apart the first ones are named first."""
        gains = {
            "a": torch.tensor([0.0, 1.0]),
            "b": torch.tensor([1.0 + 1e-7, 1.0 - 1e-7]),
            "c": torch.tensor([0.5, 1.0 + 2e-7]),
            "d": torch.tensor([-math.inf, 3.0]),
            "e": torch.tensor([-math.inf, -math.inf]),
        }
        rows = {name: values.double() for name, values in gains.items()}
        found = command.Measured({"gain": rows}, (4, 7), (), 1e-6)
        high, low = judged(found, {"max-gain": 0.5, "min-gain": 1e3})
        assert high.beyond == ("d", "a", "b", "c")
        assert low.beyond == ("d", "e", "a", "c", "b")
        assert (low.layer, low.sample) == ("d", 4)
        del rows["d"], rows["e"]
        (high,) = judged(found, {"max-gain": 0.5})
        assert (high.layer, high.sample) == ("a", 7)

    def test_all_limits_have_a_quantity(self) -> None:
        assert {limit.quantity for limit in LIMITS} == {"gain", "norm", "spectral", "cond"}


class TestWords:
    def test_failure(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--data", "d.npz", "--max-gain", "1.5", "--max-cond", "2")
        assert run("Deep", "--input", "f32[5,3]", "--max-gain", "1.5", "--max-cond", "2") == FAILED
        printed = capsys.readouterr()
        assert printed.out.splitlines()[0] == "failed: 1 of 2 limits"
        row = next(line for line in printed.out.splitlines() if "max-gain" in line)
        assert "failed" in row
        assert "layer 11, sample" in row
        assert row.split()[-2:] == ["3.46", "2.31x"]
        assert "beyond max-gain 1.5: 11 (3.46), 0 (2), 1 (2)" in printed.out
        assert "and 4 more" in printed.out
        assert printed.err == "Measuring 5 samples ...\n"
        assert run("Scaled", *words) == FAILED
        assert "20 of 20 samples of d.npz" in capsys.readouterr().out

    def test_pass(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("Scaled", "--data", "d.npz", "--max-gain", "4") == PASSED
        printed = capsys.readouterr().out
        assert printed.splitlines()[0] == "passed"
        assert "beyond max-gain" not in printed

    def test_notes(self, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setattr(
            command,
            "measured",
            lambda *args, **more: command.Measured(
                {"norm": {None: torch.zeros(1)}}, (0,), ("merged: a\x1b[2J",), 1e-9
            ),
        )
        assert run("Scaled", "--data", "d.npz", "--max-norm", "4") == PASSED
        assert r"merged: a\x1b[2J" in capsys.readouterr().out

    def test_names_of_layers_do_not_move_the_cursor(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("--data", "d.npz", "--max-gain", "0.01", "--junit", "j.xml")
        assert run("named", *words) == FAILED
        assert "\x1b" not in capsys.readouterr().out
        message = xml.parse(place / "j.xml").find(".//failure").get("message")
        assert r"layer a\x1b[2J" in message

    def test_json_is_one_object_whatever_the_model_prints(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("Talks", "--data", "d.npz", "--max-norm", "99", "--json") == PASSED
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert found["model"] == "nets.py:Talks"
        assert "keeps to max-norm 99" in found["limits"][0]["message"]
        assert "I am being built" in printed.err
        assert "I am being called" in printed.err


class TestInputs:
    def test_normal_numbers_for_a_first_linear_layer(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, found = outcome(capsys, "net", "--max-norm", "9", "--samples", "7")
        assert status == PASSED
        assert found["data"]["samples"] == 7
        assert found["data"]["name"] == "standard normal numbers, f32[7,4]"

    def test_seed_repeats_normal_numbers(self, capsys: pytest.CaptureFixture[str]) -> None:
        state = torch.get_rng_state()
        values = [
            outcome(capsys, "net", "--max-norm", "9", "--seed", seed)[1]["limits"][0]["value"]
            for seed in ("1", "1", "2")
        ]
        assert values[0] == values[1] != values[2]
        assert torch.equal(torch.get_rng_state(), state)

    def test_shape_of_a_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--input", "f32[3,1,4,4]", "--max-norm", "99")
        status, found = outcome(capsys, "Conv", *words)
        assert (status, found["data"]["samples"]) == (PASSED, 3)

    def test_tiles_do_not_matter(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("--data", "d.npz", "--max-norm", "1e-3", "--max-cond", "1", "--min-gain", "9")
        _, whole = outcome(capsys, "net", *words)
        _, one_by_one = outcome(capsys, "net", *words, "--memory", "1000")
        for first, second in zip(whole["limits"], one_by_one["limits"], strict=True):
            assert first["value"] == pytest.approx(second["value"], rel=1e-5)
            assert first["samples_beyond"] == second["samples_beyond"] == 20


class TestJUnit:
    def cases(self, place: Path) -> tuple[xml.Element, dict[str, xml.Element]]:
        root = xml.parse(place / "ci/out.xml").getroot()
        return root, {case.get("name") or "": case for case in root.iter("testcase")}

    def test_one_case_for_each_limit(self, place: Path) -> None:
        words = ("--data", "d.npz", "--max-gain", "2.5", "--max-norm", "9")
        assert run("Scaled", *words, "--junit", "ci/out.xml") == FAILED
        root, cases = self.cases(place)
        assert (root.tag, root[0].tag) == ("testsuites", "testsuite")
        for element in (root, root[0]):
            counts = [element.get(name) for name in ("tests", "failures", "errors")]
            assert counts == ["2", "1", "0"]
            assert float(element.get("time") or "nan") > 0
        failure = cases["max-gain 2.5"].find("failure")
        assert failure is not None
        assert failure.get("message") == (
            "gain 3 at layer wide, sample 0 is beyond max-gain 2.5 by 1.2x"
        )
        assert "layer wide: 3" in (failure.text or "")
        assert len(cases["max-norm 9"]) == 0

    @pytest.mark.parametrize(
        ("model", "status"), [("nowhere", NOT_LOADED), ("Coupled", NOT_DIFFERENTIABLE)]
    )
    def test_a_gate_that_could_not_be_tried_is_an_error(
        self, place: Path, model: str, status: int
    ) -> None:
        words = ("--data", "d.npz", "--max-gain", "2", "--junit", "ci/out.xml")
        assert run(model, *words) == status
        root, cases = self.cases(place)
        assert root.get("errors") == "1"
        assert cases["max-gain 2"].find("error") is not None

    def test_defect_is_an_error_too(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "judged", lambda *args: 1 / 0)
        words = ("--data", "d.npz", "--max-norm", "2", "--junit", "ci/out.xml")
        assert run("net", *words) == DEFECT
        assert self.cases(place)[0].get("errors") == "1"

    def test_an_interrupted_gate_is_an_error(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "judged", stop)
        words = ("--data", "d.npz", "--max-norm", "2", "--junit", "ci/out.xml")
        assert run("net", *words) == 130
        _, cases = self.cases(place)
        assert "KeyboardInterrupt" in cases["max-norm 2"].find("error").get("message")

    def test_place_that_cannot_be_written(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "ci").write_text("a file")
        words = ("--data", "d.npz", "--max-gain", "2", "--junit", "ci/out.xml")
        assert run("net", *words) == USAGE
        assert "--junit must be a file to write to" in capsys.readouterr().err

    def test_what_xml_cannot_hold_is_replaced(self) -> None:
        text = junit("m\x00", [Case("a<b>\x1b", failure='"&\ud800', details="x\x0by")], 0.5, "now")
        root = xml.fromstring(text)
        assert root[0].get("name") == "m\ufffd"
        assert root[0][0].get("name") == "a<b>\ufffd"
        assert root[0][0][0].get("message") == '"&\ufffd'
        assert root[0][0][0].text == "x\ufffdy"


class TestStatus:
    @pytest.mark.parametrize(
        ("words", "status", "message"),
        [
            (("net", "--data", "d.npz"), USAGE, "a gate needs a limit"),
            (("net", "--max-gain", "0"), USAGE, "expected a finite number over 0, got '0'"),
            (("net", "--max-gain", "inf"), USAGE, "expected a finite number over 0, got 'inf'"),
            (("net", "--max-gain", "nan"), USAGE, "expected a finite number over 0, got 'nan'"),
            (("net", "--max-norm", "many"), USAGE, "expected a finite number over 0, got 'many'"),
            (
                ("net", "--max-gain", "1", "--min-gain", "2"),
                USAGE,
                "--min-gain 2 is over --max-gain 1",
            ),
            (
                ("net", "--max-norm", "1", "--data", "d.npz", "--input", "f32[2,4]"),
                USAGE,
                "give --data or --input, not both",
            ),
            (("Conv", "--max-norm", "1"), USAGE, "the gate needs samples: add --data"),
            (("net", "--max-norm", "1", "--input", "i64[2,4]"), USAGE, "--input must be the dtype"),
            (("net", "--max-norm", "1", "--input", "f32[4]"), USAGE, "--input must be the dtype"),
            (("net", "--max-norm", "1", "--input", "f32[0,4]"), USAGE, "--input must be the dtype"),
            (("net", "--max-norm", "1", "--input", "4"), USAGE, "such as f32[1,3,32,32]"),
            (("net", "--max-norm", "1", "--layers", "x*"), USAGE, "matches none"),
            (("net", "--max-norm", "1", "--memory", "10"), USAGE, "more than --memory 10"),
            (("nett", "--max-norm", "1"), NOT_LOADED, "did you mean net"),
            (("net", "--max-norm", "1", "--data", "e.npz"), NOT_LOADED, "there is no file e.npz"),
            (("net", "--max-norm", "1", "--input", "f32[2,7]"), NOT_LOADED, "does not take"),
            (
                ("Coupled", "--max-cond", "1", "--data", "d.npz"),
                NOT_DIFFERENTIABLE,
                "influence each other",
            ),
            (("Root", "--max-cond", "1", "--data", "d.npz"), NOT_DIFFERENTIABLE, "must be finite"),
            (("Root", "--max-norm", "1", "--data", "d.npz"), NOT_DIFFERENTIABLE, "finite Jacobian"),
        ],
    )
    def test_error_is_said_on_standard_error(
        self,
        capsys: pytest.CaptureFixture[str],
        words: tuple[str, ...],
        status: int,
        message: str,
    ) -> None:
        assert run(*words) == status
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert "Traceback" not in printed.err

    def test_samples_on_different_paths(self) -> None:
        x = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
        data = DataSet("x", x, None, (0, 1), 2)

        class Forked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.one(x) if x[0, 0] > 0 else self.other(x)

        with pytest.raises(DifferentiationError, match="must pass the same layers"):
            measured(Forked(), data, frozenset({"gain"}), memory=300)

    def test_help_says_what_a_status_means(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--help"]) == PASSED
        printed = " ".join(capsys.readouterr().out.split())
        assert "0 all limits hold, 1 one of them does not" in printed
        assert main(["--help"]) == PASSED
        assert "1 a gate failed" in " ".join(capsys.readouterr().out.split())

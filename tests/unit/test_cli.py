"""The command: what it prints, writes and returns."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import pushforward
from pushforward import __version__
from pushforward.cli import main
from pushforward.cli import report as command
from pushforward.cli.console import progress
from pushforward.cli.main import DEFECT, DONE, INTERRUPTED, NOT_DIFFERENTIABLE, NOT_LOADED, USAGE
from pushforward.cli.parser import byte_count, natural, positive
from pushforward.report import embedded

CODE = """
import time
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def evil():
    return nn.ModuleDict

class Evil(nn.Module):
    def __init__(self):
        super().__init__()
        names = ("<script>alert(1)</script>", "b[red]")
        self.steps = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x):
        for step in self.steps.values():
            x = step(x)
        return x

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

class Smoother(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(2)))
        self.insert(1, nn.Tanh())

class Energy(nn.Module):
    def forward(self, x):
        return ((x[1:] - x[:-1] ** 2) ** 2).sum()

class Lookup(nn.Module):
    def forward(self, index, table):
        return table[index] ** 2

class Slow(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)

class Defect(nn.Module):
    def train(self, mode=True):
        raise TypeError("<bug>")

    def forward(self, x):
        return x
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with models and data, a cache of this test alone, no trace of a terminal."""
    (tmp_path / "nets.py").write_text(CODE)
    x = np.random.default_rng(0).standard_normal((6, 4), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(6) % 3)
    np.save(tmp_path / "tokens.npy", np.zeros((2, 4), dtype=np.int64))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("nets", "_pushforward_user_"))]:
        del sys.modules[name]


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which other tests look at."""
    monkeypatch.setattr(command, "to_html", lambda report: "")


def run(*words: str) -> int:
    return main(["report", *words, "--out", "out"])


class TestReport:
    def test_summary_and_files(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("nets.py:net", "--data", "d.npz") == DONE
        printed = capsys.readouterr()
        assert "decades above the truth, and the segments rung meets it." in printed.out
        for phrase in ("layer", "gain", "mixed", "||J||_2", "radius", "Written: out/report.html"):
            assert phrase in printed.out
        assert "\x1b" not in printed.out + printed.err
        assert printed.err == "Measuring 6 samples ...\n"
        assert sorted(path.name for path in (place / "out").iterdir()) == [
            "report.html",
            "report.json",
        ]

    @pytest.mark.usefixtures("no_page")
    def test_json_is_one_object_whatever_the_model_prints(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("nets.py:Talks", "--data", "d.npz", "--json") == DONE
        printed = capsys.readouterr()
        assert json.loads(printed.out) == json.loads((place / "out/report.json").read_text())
        assert "I am being built" in printed.err
        assert "I am being called" in printed.err

    @pytest.mark.usefixtures("no_page")
    def test_seed_repeats_every_number(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = []
        for _ in range(2):
            words = ("nets.py:net", "--data", "d.npz", "--samples", "3", "--seed", "1", "--json")
            assert run(*words) == DONE
            content = json.loads(capsys.readouterr().out)
            assert content.pop("provenance")["seed"] == 1
            found.append(content)
        assert found[0] == found[1]

    def test_names_stay_text(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("nets.py:Evil", "--data", "d.npz") == DONE
        assert "steps.b[red]" in capsys.readouterr().out
        page = (place / "out/report.html").read_text()
        assert "<script" not in page
        assert "&lt;script&gt;" in page

    @pytest.mark.usefixtures("no_page")
    def test_layers_and_memory(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("nets:net", "--data", "d.npz", "--layers", "1", "--memory", "1M", "--json")
        assert run(*words) == DONE
        content = json.loads(capsys.readouterr().out)
        assert len(content["layers"]) == 2
        assert content["provenance"]["memory"] == 2**20
        assert content["provenance"]["layers"] == ["1"]

    @pytest.mark.usefixtures("no_page")
    def test_embedded_model(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        x, y = embedded.training_digits()
        monkeypatch.setattr(embedded, "training_digits", lambda: (x[:200], y[:200]))
        monkeypatch.setattr(embedded, "EPOCHS", 1)
        state = torch.get_rng_state()
        assert run("--samples", "4", "--json") == DONE
        content = json.loads(capsys.readouterr().out)
        assert content["model"]["name"] == "DigitsNet (embedded)"
        assert (content["data"]["size"], content["data"]["samples"]) == (359, 4)
        assert torch.equal(torch.get_rng_state(), state)

    def test_many_layers_are_cut_in_the_table(self) -> None:
        steps = [command.Step(str(i), i / 10, 0.0, 0.0, i != 15) for i in range(20)]
        rows = command.layer_rows(tuple(steps))
        assert rows[-1] == ("(8 smaller ones)", "", "", "")
        assert [row[0] for row in rows[:-1]] == [str(i) for i in range(8, 20)]
        assert rows[7][3] == "0.00~"


class TestStatus:
    @pytest.mark.parametrize(
        ("words", "status", "message"),
        [
            (("nets.py:net",), USAGE, "a model of yours needs data: add --data"),
            (("--weights", "w.safetensors"), USAGE, "--weights needs a MODEL"),
            (("nets.py:net", "--data", "d.npz", "--layers", "x*"), USAGE, "matches none"),
            (("nets.py:net", "--data", "d.npz", "--memory", "10"), USAGE, "more than --memory 10"),
            (("nets.py:nett", "--data", "d.npz"), NOT_LOADED, "did you mean net"),
            (("m.pt",), NOT_LOADED, "--trust-code"),
            (("m.pt2", "--data", "d.npz"), NOT_LOADED, "--trust-code"),
            (("nets.py:net", "--data", "e.npz"), NOT_LOADED, "there is no file e.npz"),
            (("nets.py:net", "--data", "digits"), NOT_LOADED, "does not take the samples"),
            (("nets.py:net", "--data", "tokens.npy"), NOT_DIFFERENTIABLE, "Token ids"),
            (("nets.py:Coupled", "--data", "d.npz"), NOT_DIFFERENTIABLE, "influence each other"),
        ],
    )
    def test_error_is_one_line_and_nothing_is_written(
        self,
        place: Path,
        capsys: pytest.CaptureFixture[str],
        words: tuple[str, ...],
        status: int,
        message: str,
    ) -> None:
        assert run(*words) == status
        printed = capsys.readouterr()
        assert printed.out == ""
        last = printed.err.splitlines()[-1]
        assert last.startswith("pushforward: ")
        assert message in last
        assert "Traceback" not in printed.err
        assert not list((place / "out").iterdir()) if (place / "out").exists() else True

    @pytest.mark.parametrize("package", ["rich", "jinja2", "matplotlib"])
    def test_missing_package_is_found_before_the_work(
        self, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        assert run("nets.py:net", "--data", "d.npz") == NOT_LOADED
        assert "pip install 'pushforward[cli]'" in capsys.readouterr().err

    def test_place_that_cannot_be_written(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "out").write_text("a file")
        assert run("nets.py:net", "--data", "d.npz") == USAGE
        assert "--out must be a folder to write to" in capsys.readouterr().err

    def test_defect_is_owned_and_debug_shows_where(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("nets.py:Defect", "--data", "d.npz", "--debug") != DONE
        assert "Traceback" in capsys.readouterr().err

    def test_unexpected_error(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(command, "build", lambda options: 1 / 0)
        assert run("nets.py:net", "--data", "d.npz") == DEFECT
        assert "unexpected ZeroDivisionError" in capsys.readouterr().err

    def test_interrupt_writes_nothing(
        self,
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def interrupted(report: object) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "to_html", interrupted)
        assert run("nets.py:net", "--data", "d.npz") == INTERRUPTED
        assert "interrupted" in capsys.readouterr().err
        assert not list((place / "out").iterdir())


class TestParser:
    @pytest.mark.parametrize(
        "words",
        [
            [],
            ["nonsense"],
            ["report", "--samples", "0"],
            ["report", "--samples", "many"],
            ["report", "--seed", "-1"],
            ["report", "--memory", "lots"],
            ["report", "a", "b"],
            ["explain"],
            ["explain", "m", "--input", "f32[3]", "--quantity", "trace"],
            ["check", "m"],
        ],
    )
    def test_usage(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == USAGE
        assert "usage: pushforward" in capsys.readouterr().err

    def test_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == DONE
        assert capsys.readouterr().out.strip() == f"pushforward {__version__}"
        for words in (["--help"], ["report", "--help"], ["explain", "--help"]):
            assert main(words) == DONE
            assert "usage: pushforward" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("1", 1),
            ("500000", 500_000),
            ("1k", 1024),
            ("500M", 500 * 2**20),
            ("2GiB", 2**31),
            ("2GB", 2 * 10**9),
            ("1.5 G", 3 * 2**29),
            ("10B", 10),
        ],
    )
    def test_bytes(self, text: str, count: int) -> None:
        assert byte_count(text) == count

    @pytest.mark.parametrize("text", ["", "-1", "1X", "M", "1e9", "0"])
    def test_no_bytes(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            byte_count(text)

    def test_whole_numbers(self) -> None:
        assert (positive("3"), natural("0")) == (3, 0)
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1 on, got '0'"):
            positive("0")
        with pytest.raises(argparse.ArgumentTypeError, match=r"got '1\.5'"):
            natural("1.5")


class TestExplain:
    def test_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "nets.py:net", "--input", "f32[4]"]) == DONE
        assert capsys.readouterr().out.strip()

    def test_input_that_the_model_does_not_take(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "nets.py:net", "--input", "f32[7]"]) == USAGE
        assert "does not take --input f32[7]: RuntimeError" in capsys.readouterr().err
        assert main(["explain", "nets.py:net", "--input", "i64[4]"]) == USAGE
        assert "floating-point or complex" in capsys.readouterr().err

    def test_pattern_where_it_shows_anything(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "nets.py:Smoother", "--input", "f32[1,1,40]"]) == DONE
        printed = capsys.readouterr().out
        assert "strategy   sparse: 5 " in printed
        assert "40 x 40, 194 entries" in printed
        assert "\u28f7" in printed
        assert main(["explain", "nets.py:net", "--input", "f32[4]"]) == DONE
        assert "entries, density 100%" not in capsys.readouterr().out.splitlines()[-1]

    def test_json_is_one_object_whatever_the_model_prints(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["explain", "nets.py:Talks", "--input", "f32[6,4]", "--json"]
        assert main(words) == DONE
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert (found["strategy"], found["passes"]) == ("constant", 0)
        assert found["nnz"] == 6 * 3 * 4
        assert found["density"] == pytest.approx(1 / 6)
        assert found["cost"]["seconds"] > 0
        assert found["dense_ops"] == {}
        assert "Python state" in found["guards"]
        assert {"strategy", "reason"} == set(found["rejected"][0])
        assert "I am being called" in printed.err

    def test_batches(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["explain", "nets.py:net", "--input", "f32[6,4]", "--batch", "--json"]
        assert main(words) == DONE
        found = json.loads(capsys.readouterr().out)
        assert (found["shape"], found["batch"]) == ([3, 4], 6)
        words = ["explain", "nets.py:Coupled", "--input", "f32[6,4]", "--batch"]
        assert main(words) == NOT_DIFFERENTIABLE
        assert "influence each other through mean" in capsys.readouterr().err

    def test_quantities(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["explain", "nets.py:Energy", "--input", "f32[20]", "--quantity", "hessian"]
        assert main(words) == DONE
        assert "hessian of Energy" in capsys.readouterr().out
        words = ["explain", "nets.py:net", "--input", "f32[4]", "--quantity", "hessian"]
        assert main(words) == USAGE
        assert "one output scalar, got 3" in capsys.readouterr().err
        with_diagonal = ["--input", "f32[1,1,40]", "--quantity", "diagonal", "--json"]
        assert main(["explain", "nets.py:Smoother", *with_diagonal]) == DONE
        assert json.loads(capsys.readouterr().out)["quantity"] == "diagonal"

    def test_several_inputs(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The first one that can be differentiated is."""
        words = ["explain", "nets.py:Lookup", "--input", "i64[3]", "--input", "f32[5]", "--json"]
        assert main(words) == DONE
        found = json.loads(capsys.readouterr().out)
        assert (found["shape"], found["input"]) == ([3, 5], "float32[5]")
        assert main(["explain", "nets.py:Lookup", "--input", "i64[3]"]) == USAGE
        assert "there is nothing to differentiate with respect to" in capsys.readouterr().err

    def test_saves(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["explain", "nets.py:Smoother", "--input", "f32[1,1,40]", "--save", "s.plan"]
        assert main(words) == DONE
        printed = capsys.readouterr().out
        assert str(pushforward.load_plan(place / "s.plan")) in printed
        assert main([*words[:-1], "no/such/folder/s.plan"]) == USAGE
        assert "no/such/folder" in capsys.readouterr().err

    def test_wrong_input(self, capsys: pytest.CaptureFixture[str]) -> None:
        for spec in ("f32", "float[3]", "f32[a]", "f32[1;2]"):
            assert main(["explain", "nets.py:net", "--input", spec]) == USAGE
            assert "such as f32[1,3,32,32]" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("spec", "shape", "dtype"),
        [
            ("f32[1,3,8,8]", (1, 3, 8, 8), torch.float32),
            ("f64[]", (), torch.float64),
            (" bf16[ 2 , 3 ]", (2, 3), torch.bfloat16),
            ("i64[4]", (4,), torch.int64),
            ("c64[2]", (2,), torch.complex64),
        ],
    )
    def test_examples(self, spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        from pushforward.cli.explain import example

        state = torch.get_rng_state()
        found = example(spec)
        assert (tuple(found.shape), found.dtype) == (shape, dtype)
        assert torch.equal(torch.get_rng_state(), state)

    def test_untrusted_pickle(self) -> None:
        assert main(["explain", "m.pt", "--input", "f32[4]"]) == NOT_LOADED


class TestTerminal:
    def test_bar_with_the_time_that_is_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        with progress("Measuring [x]") as advance:
            advance(1, 2)
            advance(2, 2)
        shown = capsys.readouterr().err
        assert "Measuring [x]" in shown
        assert "100%" in shown

    @pytest.mark.usefixtures("no_page")
    def test_no_color_means_no_colour(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        assert run("nets.py:net", "--data", "d.npz") == DONE
        assert "\x1b[3" not in capsys.readouterr().out


def start(*words: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pushforward.cli import main; raise SystemExit(main())",
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )


class TestProcess:
    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
    def test_interrupted_process(self, place: Path) -> None:
        process = start("report", "nets.py:Slow", "--data", "d.npz", "--out", "out")
        while not (place / "out").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED
        assert printed == ""
        assert "Traceback" not in complaint
        assert not list((place / "out").iterdir())

    @pytest.mark.slow
    def test_reader_that_leaves_early(self) -> None:
        with start("report", "nets.py:net", "--data", "d.npz", "--json") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            complaint = process.stderr.read()
        assert process.returncode == DONE
        assert "BrokenPipe" not in complaint

    @pytest.mark.slow
    def test_output_that_cannot_hold_every_character(self) -> None:
        process = start("report", "nets.py:net", "--data", "d.npz", PYTHONIOENCODING="ascii")
        printed, complaint = process.communicate(timeout=60)
        assert process.returncode == DONE, complaint
        assert printed.isascii()

"""The documentation is so: its code runs, its printed output is real, its links lead somewhere.

In a page, ``python`` blocks share one namespace, from top to bottom. A ``text`` block right after a
block of code is what that code prints. A code block whose caption is a file name is saved under
that name. Lines ``$ pushforward ...`` of a ``console`` block are run. ``<!-- slow -->`` before a
block leaves it to the slow tests.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pushforward as pf

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")] if "_build" not in path.parts
)
FENCE = re.compile(
    r"^(?P<slow><!-- slow -->\n+)?"
    r"^```(?P<kind>\{code-block\} )?(?P<language>\w+)[ ]*\n"
    r"(?P<options>(?::\w[\w-]*:[^\n]*\n)*)\n?"
    r"(?P<code>.*?)^```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its code, the line it starts at, and what the page says it prints."""

    language: str
    code: str
    line: int
    caption: str | None
    slow: bool
    printed: str | None


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def caption_of(options: str) -> str | None:
    found = re.search(r":caption: *`?([^`\n]+)`?", options)
    return found.group(1).strip() if found else None


def output_after(text: str, end: int) -> str | None:
    """The ``text`` block that follows, if nothing but blank lines stands between."""
    following = re.match(r"\s*\n```text\n(.*?)^```", text[end:], re.MULTILINE | re.DOTALL)
    return following.group(1) if following else None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            language=found["language"],
            code=found["code"],
            line=line_of(text, found.start("code")),
            caption=caption_of(found["options"]),
            slow=found["slow"] is not None,
            printed=output_after(text, found.end()),
        )
        for found in FENCE.finditer(text)
    ]


def runs(block: Block) -> bool:
    return block.language in {"python", "console"}


RUNNING = [path for path in PAGES if any(map(runs, blocks(path)))]
SLOW = [path for path in RUNNING if any(block.slow for block in blocks(path))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; torch's global settings are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield tmp_path
    torch.set_default_dtype(dtype)


def lines(text: str) -> list[str]:
    text = re.sub(r"about [\d.]+ [mµn]?s\b", "about ... s", text)  # predicted for this machine
    return [line.rstrip() for line in text.strip().splitlines()]


def run_python(block: Block, path: Path, namespace: dict[str, object]) -> str:
    source = "\n" * (block.line - 1) + block.code  # tracebacks then show the line of the page
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(path), "exec"), namespace)
    return printed.getvalue()


def run_console(block: Block) -> str:
    commands = [line for line in block.code.splitlines() if line.startswith("$ pushforward")]
    printed = io.StringIO()
    for line in commands:
        from pushforward.cli import main

        progress = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
            status = main(shlex.split(line, comments=True)[2:])
        assert status == 0, f"{line!r} ended with status {status}: {progress.getvalue()}"
    return printed.getvalue()


def run_page(path: Path, folder: Path, with_slow: bool) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in filter(runs, blocks(path)):
        if block.slow and not with_slow:
            continue
        if block.caption and block.caption.endswith(".py"):
            (folder / block.caption).write_text(block.code, encoding="utf-8")
            continue
        if block.language == "python":
            printed = run_python(block, path, namespace)
        else:
            printed = run_console(block)
        if block.printed is not None:
            assert lines(printed) == lines(block.printed), f"{name(path)}:{block.line}"


# torch's own forward mode, which some pages show, compiles its decompositions with torch.jit.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@FORWARD_MODE
@pytest.mark.parametrize("path", RUNNING, ids=name)
def test_code_of_a_page_runs_and_prints_what_the_page_shows(path: Path, fresh: Path):
    run_page(path, fresh, with_slow=False)


@FORWARD_MODE
@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=name)
def test_slow_code_of_a_page_runs(path: Path, fresh: Path):
    run_page(path, fresh, with_slow=True)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_no_block_of_code_escapes(path: Path):
    text = path.read_text(encoding="utf-8")
    fences = re.findall(r"^```(?:\{code-block\} )?(?:python|console)", text, re.MULTILINE)
    assert len(fences) == sum(runs(block) for block in blocks(path))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_relative_links_lead_somewhere(path: Path):
    targets = [link.split("#")[0] for link in LINK.findall(path.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert not missing, f"{name(path)} links to {missing}"


def code_without_comments(path: Path) -> list[str]:
    code = "\n".join(block.code for block in blocks(path) if block.language == "python")
    return [line.split("#")[0].rstrip() for line in code.splitlines()]


def test_both_readmes_have_the_same_code():
    assert code_without_comments(ROOT / "README.md") == code_without_comments(ROOT / "README.zh.md")


def test_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= set(citation)
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_changelog_has_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(project['version'])}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M
    )


def test_every_public_name_has_a_place_in_the_reference():
    pages = " ".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    names = [name for name in pf.__all__ if not name.startswith("_")]
    assert {name for name in names if not re.search(rf"\b{name}\b", pages)} == set()


@pytest.mark.parametrize("command", ["report", "explain"])
def test_every_option_is_documented(command: str, capsys: pytest.CaptureFixture[str]):
    from pushforward.cli import main

    assert main([command, "--help"]) == 0
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert {option for option in options if f"`{option}" not in page} == set()


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """What the tutorial's script found, what it printed, and where it drew."""
    folder = tmp_path_factory.mktemp("tutorial")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    script = runpy.run_path(str(DOCS / "tutorial" / "find_the_layer.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = script["main"](folder)
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    return found, printed.getvalue(), folder


def test_tutorial_finds_the_layer_and_repairs_it(tutorial: tuple[dict[str, Any], str, Path]):
    found, _, _ = tutorial
    assert found["found"] == "4.1"
    assert found["bad"] < 0.2
    assert found["good"] > 0.95
    for path in (found["before"], found["after"]):
        total = sum(row.log_gain for row in path.layers)
        torch.testing.assert_close(total, path.log_norm, rtol=1e-4, atol=1e-3)


def test_tutorial_prints_what_its_page_shows(tutorial: tuple[dict[str, Any], str, Path]):
    """Words are the same, numbers are close: their last digits depend on the processor."""
    _, printed, _ = tutorial
    shown = (DOCS / "tutorial" / "output.txt").read_text(encoding="utf-8")
    assert lines(NUMBER.sub("0", printed)) == lines(NUMBER.sub("0", shown))
    ours, theirs = (torch.tensor([float(n) for n in NUMBER.findall(t)]) for t in (printed, shown))
    torch.testing.assert_close(ours, theirs, rtol=0.25, atol=0.1)


def test_tutorial_draws_its_pictures(tutorial: tuple[dict[str, Any], str, Path]):
    _, _, folder = tutorial
    assert {path.name for path in folder.iterdir()} == {"waterfall.png", "loss.png"}
    assert all((DOCS / "tutorial" / path.name).exists() for path in folder.iterdir())


@pytest.fixture(scope="module")
def newton(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The same for the tutorial on Newton's method."""
    folder = tmp_path_factory.mktemp("newton")
    script = runpy.run_path(str(DOCS / "tutorial" / "newton.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = script["main"](folder)
    return found, printed.getvalue(), folder


def test_newton_converges_quadratically_to_the_dense_solution(
    newton: tuple[dict[str, Any], str, Path],
):
    found, _, _ = newton
    assert found["entries"] == 5 * 32**2 - 4 * 32
    assert found["residuals"][-1] < 1e-10
    assert found["difference"] < 1e-10
    assert 0.5 < found["quotients"][-1] / found["quotients"][-2] < 2
    assert max(found["quotients"]) < 0.2


def test_newton_takes_as_many_passes_as_a_row_has_entries(
    newton: tuple[dict[str, Any], str, Path],
):
    found, _, _ = newton
    assert found["plan"].passes == 5


def test_newton_prints_what_its_page_shows(newton: tuple[dict[str, Any], str, Path]):
    """Words are the same; sizes and counts too, residuals to within their rounding."""
    _, printed, folder = newton
    shown = (DOCS / "tutorial" / "newton.txt").read_text(encoding="utf-8")
    assert lines(NUMBER.sub("0", printed)) == lines(NUMBER.sub("0", shown))
    ours, theirs = (torch.tensor([float(n) for n in NUMBER.findall(t)]) for t in (printed, shown))
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=1e-6)
    assert {path.name for path in folder.iterdir()} == {"newton.png"}
    assert (DOCS / "tutorial" / "newton.png").exists()

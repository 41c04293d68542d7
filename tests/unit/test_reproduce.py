"""The framework: seeds, claims, criteria, data, pages and the command."""

import argparse
import gzip
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pushforward.cli import main, parser
from pushforward.cli import reproduce as command
from pushforward.cli.main import DONE, NOT_LOADED, USAGE
from pushforward.errors import InputError, LoadError
from pushforward.report.canvas import Picture, draw
from pushforward.reproduce import papers
from pushforward.reproduce.data import Images, held_out, load_images
from pushforward.reproduce.page import headline, parts_text, to_html
from pushforward.reproduce.paper import (
    Claim,
    Criterion,
    Outcome,
    Paper,
    Progress,
    at_least,
    at_most,
    between,
)
from pushforward.reproduce.papers import PAPERS, papers_named
from pushforward.reproduce.study import Finding, Spread, Study, payload, study


@dataclass(frozen=True)
class Settings:
    size: int = 3


def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
    progress(1, 2)
    print("trained")
    draw_ = torch.randn(settings.size).sum().item()
    return Outcome({"draw": draw_, "images": float(len(images.train_x))}, {"size": settings.size})


def figures(outcomes) -> tuple[Picture, ...]:
    svg = draw("<k>", (2, 2), lambda figure: figure.subplots().plot([0, 1], [0, 1]))
    return (Picture("picture", f"Sizes {outcomes[0].drawn['size']}", "<b>", "a line", svg),)


def toy(**changes) -> Paper:
    made = Paper(
        name="toy",
        title="A <toy>",
        authors="N. N.",
        source="nowhere",
        summary="Nothing is trained.",
        data="digits",
        settings=Settings(),
        quick=Settings(1),
        measure=measure,
        figures=figures,
        claims=(
            Claim("many images", "1 (Table 1)", lambda m: m["images"], at_least(2), "images"),
            Claim("no draw", "0", lambda m: abs(m["draw"]), at_most(0), shown=("draw",)),
        ),
        seeds=2,
    )
    return replace(made, **changes)


def few_images(train: int = 4) -> Images:
    x, y = torch.rand(train + 2, 1, 4, 4), torch.arange(train + 2) % 10
    return Images("few", x[:train], y[:train], x[train:], y[train:])


@pytest.fixture
def one_paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    made = toy()
    monkeypatch.setattr(papers, "PAPERS", {"toy": made})
    monkeypatch.setattr(command, "load_images", lambda spec: few_images())
    return made


# --- criteria and spreads -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "inside", "outside", "words"),
    [
        (at_least(3), (3, 4), (2.9, math.nan), "at least 3"),
        (at_most(-1.5), (-1.5, -math.inf), (0, math.nan), "at most -1.5"),
        (between(0, 1), (0, 0.5, 1), (-0.1, 1.1, math.nan), "0 to 1"),
    ],
)
def test_criteria_include_their_ends_and_no_nan(
    criterion: Criterion, inside: tuple, outside: tuple, words: str
) -> None:
    assert all(map(criterion.met, inside))
    assert not any(map(criterion.met, outside))
    assert str(criterion) == words


def test_spread_is_the_standard_deviation_of_a_sample():
    spread = Spread((1.0, 2.0, 6.0))
    assert spread.mean == pytest.approx(3)
    assert spread.deviation == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert str(spread) == "3 ± 2.6"


def test_one_seed_has_no_spread():
    assert Spread((4.0,)).deviation is None
    assert str(Spread((4.0,))) == "4"


def test_spread_of_what_is_not_finite():
    assert math.isnan(Spread((1.0, math.inf)).deviation)


# --- studies ------------------------------------------------------------------------------------


def test_seeds_repeat_and_leave_the_generator_alone():
    images = few_images()
    one = study(toy(), images, 2, Settings())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    other = study(toy(), images, 3, Settings())
    again = study(toy(), images, 2, Settings())
    assert torch.equal(torch.get_rng_state(), state)
    assert one.numbers == again.numbers
    assert other.numbers["draw"].values[:2] == one.numbers["draw"].values
    assert len(set(other.numbers["draw"].values)) == 3


def test_seeds_run_on_one_thread_with_gradients():
    seen = []

    def watch(images: Images, settings: Settings, progress: Progress) -> Outcome:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return measure(images, settings, progress)

    with torch.no_grad():
        study(toy(measure=watch), few_images(), 1, Settings())
    assert seen == [(1, True)]


def test_progress_is_in_seeds():
    heard = []
    study(toy(), few_images(), 2, Settings(), lambda done, total: heard.append((done, total)))
    assert heard == [(0.5, 2), (1.5, 2)]


def test_claims_are_judged_by_the_mean():
    found = study(toy(), few_images(), 2, Settings())
    many, none = found.findings
    assert (many.holds, none.holds) == (True, False)
    assert many.measured.values == (4.0, 4.0)
    assert none.parts == {"draw": found.numbers["draw"]}


def test_payload_is_strict_and_complete():
    claims = (Claim("x", "y", lambda m: math.nan, at_least(0)),)
    content = payload(study(toy(claims=claims), few_images(), 1, Settings()))
    text = json.dumps(content, allow_nan=False)
    (claim,) = json.loads(text)["claims"]
    assert (claim["claim"], claim["published"], claim["holds"]) == ("x", "y", False)
    assert (claim["measured"], claim["spread"], claim["criterion"]) == ("nan", None, "at least 0")


# --- pages --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Study:
    return study(toy(), few_images(), 2, Settings())


def test_page_is_self_contained_and_escaped(found: Study):
    page = to_html(found)
    assert "<h1>A &lt;toy&gt;</h1>" in page
    assert "&lt;b&gt;" in page
    assert "Sizes 3" in page
    assert "<script" not in page
    assert "src=" not in page.replace("img-src", "")
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_page_shows_claims_numbers_and_settings(found: Study):
    page = to_html(found)
    for phrase in ("many images", "1 (Table 1)", "4 ± 0 images", "at least 2", "size 3", "0, 1"):
        assert phrase in page
    assert page.count('class="yes"') == 1
    assert page.count('class="no"') == 1


def test_page_of_one_seed_says_nothing_of_spread():
    page = to_html(study(toy(notes=("a note",)), few_images(), 1, Settings()))
    assert "Means over 1 seed." in page
    assert "a note" in page


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (("norm, none", "norm, L2"), "none 1, L2 2"),
        (("norm of all", "norm, L2"), "norm of all 3, norm, L2 2"),
        (("norm, L2",), "norm, L2 2"),
        ((), ""),
    ],
)
def test_parts_go_by_what_tells_them_apart(shown: tuple[str, ...], words: str) -> None:
    values = {"norm, none": 1.0, "norm, L2": 2.0, "norm of all": 3.0}
    parts = {name: Spread((values[name],)) for name in shown}
    claim = Claim("x", "y", lambda m: 0.0, at_least(0))
    assert parts_text(Finding(claim, Spread((0.0,)), parts)) == words


def test_headline_names_what_failed(found: Study):
    assert headline(found) == "1 of 2 claims hold here. Not reproduced: no draw."
    kept = toy(claims=toy().claims[:1])
    assert headline(study(kept, few_images(), 1, Settings())) == "All 1 claims hold here."


# --- data ---------------------------------------------------------------------------------------


def test_held_out_images_are_a_fifth_and_mixed():
    x, y = torch.arange(50.0).reshape(50, 1, 1, 1), torch.arange(50) // 5
    images = held_out("some", x, y)
    assert (len(images.train_x), len(images.test_x)) == (40, 10)
    everything = torch.cat([images.train_x, images.test_x]).flatten()
    assert everything.sort().values.tolist() == list(range(50))
    assert torch.equal(images.train_y, images.train_x.flatten().long() // 5)
    assert images.test_y.unique().tolist() == list(range(10))
    assert not torch.equal(images.train_y, images.train_y.sort().values)
    assert torch.equal(held_out("some", x, y).train_x, images.train_x)


@pytest.mark.parametrize(("name", "side", "size"), [("digits", 8, 1797), ("mnist5k", 28, 5000)])
def test_built_in_images(name: str, side: int, size: int) -> None:
    images = load_images(name)
    assert images.train_x.shape[1:] == (1, side, side)
    assert len(images.train_x) + len(images.test_x) == size
    assert 0 <= images.train_x.min() < images.train_x.max() == 1
    assert images.pixels == side**2
    assert images.train_y[:50].unique().numel() == 10


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "x_train": rng.integers(256, size=(12, 5, 4), dtype=np.uint8),
        "y_train": rng.integers(10, size=12, dtype=np.uint8),
        "x_test": rng.integers(256, size=(3, 5, 4), dtype=np.uint8),
        "y_test": rng.integers(10, size=3, dtype=np.uint8),
    }


@pytest.fixture
def mnist() -> dict[str, np.ndarray]:
    return arrays(np.random.default_rng(0))


def check_mnist(images: Images, content: dict[str, np.ndarray]) -> None:
    assert images.train_x.shape == (12, 1, 5, 4)
    assert np.allclose(images.train_x[:, 0].numpy(), content["x_train"] / 255)
    assert images.test_y.tolist() == content["y_test"].tolist()


def test_npz_of_mnist(tmp_path: Path, mnist: dict[str, np.ndarray]):
    np.savez(tmp_path / "mnist.npz", **mnist)
    check_mnist(load_images(str(tmp_path / "mnist.npz")), mnist)


def test_floats_and_a_last_channel_are_taken(tmp_path: Path, mnist: dict[str, np.ndarray]):
    changed = {**mnist, "x_train": mnist["x_train"][..., None] / 255}
    np.savez(tmp_path / "mnist.npz", **changed)
    check_mnist(load_images(str(tmp_path / "mnist.npz")), mnist)


def write_idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, content: dict[str, np.ndarray], ending: str) -> None:
    write_idx(folder / f"train-images{ending}", content["x_train"])
    write_idx(folder / f"train-labels{ending}", content["y_train"])
    write_idx(folder / f"t10k-images{ending}", content["x_test"])
    write_idx(folder / f"t10k-labels{ending}", content["y_test"])


@pytest.mark.parametrize("ending", ["-idx3-ubyte", ".idx3-ubyte", "-idx3-ubyte.gz"])
def test_idx_files_by_folder_or_by_one_of_them(
    tmp_path: Path, mnist: dict[str, np.ndarray], ending: str
) -> None:
    write_mnist(tmp_path, mnist, ending)
    check_mnist(load_images(str(tmp_path)), mnist)
    check_mnist(load_images(str(tmp_path / f"train-images{ending}")), mnist)


def test_what_is_no_data_is_named(tmp_path: Path, mnist: dict[str, np.ndarray]):
    np.savez(tmp_path / "half.npz", x_train=mnist["x_train"])
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    (tmp_path / "m.csv").write_text("1,2")
    for spec, message in {
        "nowhere.npz": "there is no file nowhere.npz; --data must be digits, mnist5k, or 'mnist",
        str(tmp_path / "half.npz"): "must hold x_train, y_train, x_test, y_test; it holds x_train",
        str(tmp_path / "broken.npz"): "cannot be read: ",
        str(tmp_path / "m.csv"): "--data must be digits",
        str(tmp_path): "train-images is missing",
    }.items():
        with pytest.raises(LoadError, match=message):
            load_images(spec)


def test_idx_of_other_numbers_is_refused(tmp_path: Path, mnist: dict[str, np.ndarray]):
    write_mnist(tmp_path, mnist, "-idx3-ubyte")
    write_idx(tmp_path / "train-images-idx3-ubyte", mnist["x_train"], kind=13)
    with pytest.raises(LoadError, match="must be an idx file of unsigned bytes"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("x_train", np.zeros((12, 20)), r"must be \(samples, height, width\), got \(12, 20\)"),
        ("x_test", np.full((3, 5, 4), 2.0), "must be bytes, or floats from 0 to 1"),
        ("x_test", np.full((3, 5, 4), np.nan), "must be bytes, or floats from 0 to 1"),
        ("y_train", np.zeros(11, np.int64), "must be 12 whole numbers from 0 to 9"),
        ("y_train", np.full(12, 10), "must be 12 whole numbers from 0 to 9"),
        ("y_test", np.zeros(3), "must be 3 whole numbers from 0 to 9, got torch.float64"),
    ],
)
def test_arrays_that_are_no_digits_are_refused(
    tmp_path: Path, mnist: dict[str, np.ndarray], part: str, wrong: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "mnist.npz", **{**mnist, part: wrong})
    with pytest.raises(LoadError, match=message):
        load_images(str(tmp_path / "mnist.npz"))


# --- the command --------------------------------------------------------------------------------


def test_all_papers_are_there_under_their_names():
    assert all(name == paper.name for name, paper in PAPERS.items())
    assert papers_named(()) == tuple(PAPERS.values())


def test_papers_come_in_the_order_asked_for_each_once():
    first, second = list(PAPERS)[:2]
    assert [paper.name for paper in papers_named((second, first, second))] == [second, first]


def test_an_unknown_paper_is_named_with_what_is_near():
    with pytest.raises(InputError, match="did you mean jacobian-regularization"):
        papers_named(("jacobian-regularisation",))
    with pytest.raises(InputError, match=r"PAPER must be one of .*; got '42'$"):
        papers_named(("42",))


@pytest.mark.parametrize("paper", PAPERS.values(), ids=PAPERS)
def test_papers_say_where_figures_stand_and_what_would_do(paper: Paper) -> None:
    assert paper.claims
    texts = [claim.text for claim in paper.claims]
    assert len(set(texts)) == len(texts)
    for claim in paper.claims:
        assert claim.published
        assert claim.criterion != Criterion()
    assert type(paper.quick) is type(paper.settings)


def run(*words: str) -> int:
    return main(["reproduce", *words])


@pytest.mark.usefixtures("one_paper")
def test_json_is_one_object_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("toy", "--json", "--out", str(tmp_path)) == DONE
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert list(content) == ["toy"]
    assert set(content["toy"]["claims"][0]) >= {"claim", "published", "measured", "holds"}
    assert content["toy"]["claims"][0]["measured"] == 4.0
    assert content["toy"]["seeds"] == 2
    assert printed.err.splitlines() == ["Reproducing toy on few ...", "trained", "trained"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy.html"]


@pytest.mark.usefixtures("one_paper")
def test_tables_name_what_holds_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--seeds", "3", "--out", "out") == DONE
    printed = capsys.readouterr().out
    for phrase in ("A <toy> (nowhere)", "many images", "at least 2", "Written: out/toy.html"):
        assert phrase in printed
    assert "1 of 2 claims hold here. Not reproduced: no draw." in printed


def test_quick_takes_the_quick_settings(
    one_paper: Paper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--quick", "--seeds", "1", "--out", str(tmp_path)) == DONE
    page = (tmp_path / "toy.html").read_text()
    assert "size 1" in page
    assert "A quick run, too short to judge the paper by." in page
    assert run("--seeds", "1", "--out", str(tmp_path)) == DONE
    assert "A quick run" not in (tmp_path / "toy.html").read_text()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("nosuchpaper",), USAGE, "PAPER must be one of"),
        (("--data", "none.npz"), NOT_LOADED, "there is no file none.npz"),
        (("--data", "mnist"), NOT_LOADED, "there is no file mnist"),
        (("--data", "mnist", "none.npz"), NOT_LOADED, "there is no file none.npz"),
        (("--data", "mnist", "--json"), NOT_LOADED, "there is no file mnist"),
        (("--seeds", "0"), USAGE, "expected a whole number from 1 on"),
    ],
)
def test_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == status
    assert message in capsys.readouterr().err


def test_each_set_of_images_is_read_once(monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(command, "load_images", lambda spec: read.append(spec) or few_images())
    chosen = (toy(name="a"), toy(name="b"), toy(name="c", data="mnist5k"))
    assert set(command.load_all(chosen, None)) == {"a", "b", "c"}
    assert read == ["digits", "mnist5k"]
    command.load_all(chosen, "here.npz")
    assert read[2:] == ["here.npz"]


def test_mnist_before_a_path_is_left_out():
    found: argparse.Namespace = parser.parse(["reproduce", "--data", "mnist", "a.npz", "--json"])
    assert (found.data, found.papers, found.json) == ("a.npz", [], True)

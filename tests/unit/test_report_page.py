"""report.html and report.json: what is in them, and what must not be."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pushforward.errors import MissingDependencyError
from pushforward.report import render
from pushforward.report.canvas import draw
from pushforward.report.data import DataSet
from pushforward.report.layer_figures import ROWS, condensed, shown
from pushforward.report.measure import measure
from pushforward.report.models import LoadedModel
from pushforward.report.optional import require
from pushforward.report.payload import SCHEMA_VERSION, Report, strict, to_json
from pushforward.report.render import LARGEST_PAGE, to_html
from pushforward.report.summary import Step
from pushforward.report.verdict import verdict
from pushforward.report.writing import write_together

EVIL = "<script>alert(1)</script>"


class Named(nn.Module):
    """Layers whose names try to be markup, mathematics and terminal codes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = (EVIL, "</svg>$x^2$ \\frac{", "\x1b[31m[bold]层")
        sizes = ((16, 8), (8, 8), (8, 3))
        pairs = zip(names, sizes, strict=True)
        self.steps = nn.ModuleDict({name: nn.Linear(*size) for name, size in pairs})

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for step in self.steps.values():
            x = torch.tanh(step(x))
        return x


def make(model: nn.Module, x: Tensor, **more: object) -> Report:
    data = DataSet("some <b>data</b>", x, None, tuple(range(len(x))), len(x), **more)  # type: ignore
    measurement = measure(model, data)
    provenance = {"seed": 0, "memory": None, "versions": {"pushforward": "0", "torch": "2"}}
    loaded = LoadedModel(model, "zoo.py:named", "built by zoo.py:named")
    return Report(loaded, data, measurement, verdict(measurement, data.y), provenance)


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report() -> Report:
    classes = torch.arange(5) % 3
    full = make(Named(), images(), image_shape=(1, 4, 4))
    data = replace(full.data, y=classes, classes=("a", "<i>b</i>", "c"), notes=("noted \x07",))
    return replace(full, data=data)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return to_html(report)


@pytest.fixture(scope="module")
def content(report: Report) -> dict:
    return json.loads(to_json(report), parse_constant=lambda word: pytest.fail(word))


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


class TestPage:
    def test_names_stay_text(self, page: str) -> None:
        elements = _Elements(page)
        assert not elements.of("script", "b", "i")
        assert EVIL not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "$x^2$ \\frac{" in page
        assert "\x1b" not in page
        assert "\x07" not in page

    def test_nothing_is_loaded_from_elsewhere(self, page: str) -> None:
        elements = _Elements(page)
        assert not elements.of("link", "iframe", "object", "embed")
        sources = [attributes.get("src") or "" for attributes in elements.of("img")]
        assert sources
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert "default-src 'none'" in page
        assert "@import" not in page
        assert len(page.encode()) < LARGEST_PAGE

    def test_pictures_take_the_colours_of_the_page(self, page: str) -> None:
        drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(drawings) == 6
        for drawing in drawings:
            assert "var(--" in drawing
            assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawing)
            assert "<style" not in drawing
        assert "prefers-color-scheme: dark" in page
        for variable in set(re.findall(r"var\((--\w+)\)", page)):
            assert f"{variable}:" in page

    def test_everything_seen_is_also_said(self, page: str) -> None:
        elements = _Elements(page)
        charts = [a for a in elements.of("div") if a.get("class") == "chart"]
        assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
        assert all(image["alt"] for image in elements.of("img"))
        assert len(set(elements.ids)) == len(elements.ids)
        references = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", page))
        assert references <= set(elements.ids)

    def test_same_numbers_same_page(self, report: Report, page: str) -> None:
        assert to_html(report) == page

    def test_page_that_would_be_too_large_gives_up_the_images(
        self, report: Report, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(render, "pictures", lambda measurement: ())
        assert "<img" in to_html(report)
        monkeypatch.setattr(render, "LARGEST_PAGE", 1000)
        smaller = to_html(report)
        assert "<img" not in smaller
        assert "sample 0" in smaller

    def test_true_and_read_classes(self, page: str) -> None:
        assert "read as" in page
        assert re.search(r"read as (a|&lt;i&gt;b&lt;/i&gt;|c), is", page)

    def test_model_without_classes_or_pictures(self) -> None:
        regression = make(nn.Linear(4, 1), torch.randn(3, 4))
        content = json.loads(to_json(regression))
        assert content["margin"] is content["radius"] is content["accuracy"] is None
        page = to_html(regression)
        assert "no margins and no robustness radii" in page
        assert "robustness radius</dt><dd class" not in page
        assert "<img" not in page

    def test_dead_model(self) -> None:
        page = to_html(make(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), -torch.ones(2, 4)))
        assert "does not answer to the input at all" in page
        assert "no other class near" in page
        assert page.count("<svg") == 1

    def test_many_layers(self) -> None:
        torch.manual_seed(0)
        deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(ROWS + 20)))
        page = to_html(make(deep, torch.randn(2, 4)))
        assert "smaller steps)" in page
        assert page.count('<th scope="row">') > ROWS + 20

    def test_table_of_layers_has_an_end(
        self, report: Report, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(render, "TABLE_ROWS", 2)
        assert "1 more layers stand in report.json" in to_html(report)


class TestPictures:
    def test_condensed_path_keeps_ends_totals_and_the_largest(self) -> None:
        gains = [0.01] * 30 + [3.0] + [0.02] * 30 + [-2.0] + [0.01] * 5
        levels = [sum(gains[place:]) for place in range(len(gains))]
        path = [
            Step(str(place), gain, level, 2 * level, place != 5)
            for place, (gain, level) in enumerate(zip(gains, levels, strict=True))
        ]
        rows = condensed(path, 16)
        assert len(rows) <= 2 * 16
        assert (rows[0].name, rows[-1].name) == ("0", "66")
        assert {"30", "61"} <= {row.name for row in rows}
        assert sum(row.gain for row in rows) == pytest.approx(sum(gains))
        behind = [*(row.level for row in rows[1:]), 0.0]
        for row, after in zip(rows, behind, strict=True):
            assert row.level - after == pytest.approx(row.gain)
        assert sum(not row.exact for row in rows) == 1

    def test_short_path_is_left(self) -> None:
        path = (Step("a", 1.0, 1.0, 1.0, True),)
        assert condensed(path, 16) == path

    def test_long_names_lose_their_middle(self) -> None:
        assert shown("short") == "short"
        long = "encoder.layers.11.attention.self.query_key_value"
        assert len(shown(long)) <= 30
        assert shown(long).startswith("encoder.layers")
        assert shown(long).endswith("query_key_value")

    def test_drawing_leaves_matplotlib_alone(self) -> None:
        matplotlib = require("matplotlib")
        before = dict(matplotlib.rcParams)
        draw("x", (2, 2), lambda figure: figure.subplots().plot([1, 2]))
        assert dict(matplotlib.rcParams) == before


class TestJson:
    def test_names_of_path_bound(self, report: Report, content: dict) -> None:
        path = report.measurement.path
        assert content["log_norm"]["per_sample"] == pytest.approx(path.log_norm.tolist())
        assert content["log_norm"]["mean"] == pytest.approx(path.log_norm.mean().item())
        assert set(content["rungs"]) == {"frobenius", "mixed", "spectral", "segments"}
        assert set(content["certified"]) == set(content["labels"]) == set(content["rungs"])
        assert [row["name"] for row in content["layers"]] == [layer.name for layer in path.layers]
        for name in ("log_gain", "log_fro", "log_spectral", "log_bound_so_far"):
            for row in content["layers"]:
                assert len(row[name]["per_sample"]) == 5
                assert math.isfinite(row[name]["mean"])

    def test_means_add_up(self, content: dict) -> None:
        gains = sum(row["log_gain"]["mean"] for row in content["layers"])
        assert gains == pytest.approx(content["log_norm"]["mean"])
        bound = sum(row["log_fro"]["mean"] for row in content["layers"])
        assert bound == pytest.approx(content["rungs"]["frobenius"]["mean"])
        assert content["gap"]["frobenius"]["mean"] == pytest.approx(
            bound - content["log_norm"]["mean"]
        )

    def test_versioned_sorted_and_complete(self, report: Report, content: dict) -> None:
        assert content["schema_version"] == SCHEMA_VERSION
        assert list(content) == sorted(content)
        assert content["data"]["labels"] == [0, 1, 2, 0, 1]
        assert content["model"]["parameters"] == 16 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3
        assert len(content["noise"]) == len(report.measurement.noise)
        for row in content["noise"]:
            assert row["low"]["mean"] <= row["ratio"]["mean"] <= row["high"]["mean"]

    def test_every_name_is_documented(self, content: dict) -> None:
        text = Path(__file__).parents[2].joinpath("docs/reference/report-json.md").read_text()
        names = {*content, *content["data"], *content["model"], *content["layers"][0]}
        names |= {*content["noise"][0], *content["verdict"]}
        assert {name for name in names if f"`{name}`" not in text} == set()
        assert f"Version {SCHEMA_VERSION}" in text

    def test_what_is_not_finite_stays_readable(self) -> None:
        model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        text = to_json(make(model, torch.tensor([[1.0, 2], [-1, -2]])))
        content = json.loads(text, parse_constant=lambda word: pytest.fail(word))
        assert content["zero_jacobians"] == [1]
        log_norm = content["log_norm"]
        assert log_norm["per_sample"][1] == "-inf"
        assert float(log_norm["per_sample"][1]) == -math.inf
        assert log_norm["mean"] == log_norm["per_sample"][0]
        assert content["radius"]["per_sample"][1] == "inf"
        assert math.isfinite(content["radius"]["mean"])

    def test_no_sample_to_average_over(self) -> None:
        content = json.loads(to_json(make(nn.ReLU(), -torch.ones(2, 3))))
        assert content["log_norm"]["mean"] is None

    def test_strict_leaves_nothing_that_json_lacks(self) -> None:
        value = {1: (math.nan, torch.tensor([math.inf, 1.0])), "a": True, "b": None}
        assert strict(value) == {"1": ["nan", ["inf", 1.0]], "a": True, "b": None}


class TestWriting:
    def test_all_files_or_none(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "missing" / "two"
        one.write_text("old")
        with pytest.raises(FileNotFoundError):
            write_together({one: "new", two: b"new"})
        assert one.read_text() == "old"
        assert list(tmp_path.iterdir()) == [one]

    def test_text_and_bytes(self, tmp_path: Path) -> None:
        write_together({tmp_path / "a": "é", tmp_path / "b": b"\x00"})
        assert (tmp_path / "a").read_bytes() == "é".encode()
        assert (tmp_path / "b").read_bytes() == b"\x00"
        assert len(list(tmp_path.iterdir())) == 2


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"'scikit-learn'.*'pushforward\[cli\]'"):
        require("sklearn.datasets")

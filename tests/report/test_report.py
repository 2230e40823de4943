"""The page: everything on it, nothing from outside, whatever the files hold; in a real browser."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import EVERYWHERE, Workshop

from gptlite.data.prepare import prepare
from gptlite.errors import ConfigError, StorageError
from gptlite.measure import suites
from gptlite.measure.suites import Effort
from gptlite.report import charts
from gptlite.report import page as report
from gptlite.report.network import network
from gptlite.runs.results import read_run
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

SMALL = Effort(64, 32, 32, (0, 0.5, 1), 2, (1, 3))
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{ \x1b[31m \u202e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every measurement, another beside it, and a study."""
    workshop = Workshop(tmp_path_factory.mktemp("report"))
    dropout = EVERYWHERE.model_dump(mode="json")
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16}
    for name, over in (("run", {"dropout": dropout}), ("other", {"seed": 7})):
        train(workshop.run(model=model, sample={"interval": 4}, **over), workshop.folder / name)
    trained = load_trained(workshop.folder / "run", "best")
    arguments = (trained, "val", ["all"], lambda: prepare(trained.run))
    results = suites.run_suites(*arguments, effort=SMALL)
    suites.save_results(workshop.folder / "run", "val", trained.state.step, results, False)
    (workshop.folder / "study").mkdir()
    (workshop.folder / "study" / "study.json").write_text(json.dumps(study()))
    return workshop.folder


def study() -> dict[str, Any]:
    """As study.py writes it, with labels that nobody should trust."""

    def summary(x: float) -> dict[str, Any]:
        return {"mean": x, "low": x - 0.1, "high": x + 0.1, "values": [x - 0.05, x, x + 0.05]}

    labels = {0.0: "rate=0", 0.1: "rate=0.1", 0.3: HOSTILE}
    points = [
        {
            "label": name,
            "point": {"dropout.rate": rate},
            "metrics": {"best_val_loss": summary(2 + rate)},
        }
        for rate, name in labels.items()
    ]
    compared = {"metric": "best_val_loss", "difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.01}
    return {
        **{"name": HOSTILE, "axes": {"dropout.rate": [0, 0.1, 0.3]}, "seeds": [1, 2, 3]},
        "table": ["best_val_loss"],
        "runs": [
            {"label": HOSTILE, "seed": 1, "state": "failed", "why": HOSTILE},
            {"label": "rate=0", "seed": 1, "state": "done"},
        ],
        "points": points,
        "comparisons": [
            {**compared, "label": "rate=0.1", "above_seed_noise": True},
            {**compared, "label": HOSTILE, "above_seed_noise": None, "low": None, "high": None},
        ],
    }


def page(*sources: Path) -> str:
    return report.render(report.page_of(list(sources)))


def test_a_page_of_a_run_has_everything(folder: Path) -> None:
    html = page(folder / "run")
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert titles[:4] == ["Losses", "Learning rate", "Gradient norm", "Throughput"]
    for title in (
        *("The network and its dropout sites", "Dropout rates over the run"),
        *("Dropout rates over depth", "Without some of its heads", "Without some of its layers"),
        *("Importance of heads", "Reliability", "Averaging passes with dropout on"),
        *("Loss by position", "step 4", "step 8"),
    ):
        assert title in titles
    assert "Not measured yet" not in titles
    assert "<summary>Config</summary>" in html
    assert "<summary>Environment</summary>" in html
    assert "best validation loss" in html
    assert 'class="verdict"' in html
    assert "Not readable" not in html


def test_what_was_not_measured_is_said_with_the_command(folder: Path) -> None:
    assert "gptlite eval --suite all" in page(folder / "other")


def test_the_same_files_make_the_same_bytes(folder: Path) -> None:
    assert page(folder / "run") == page(folder / "run")


def test_names_within_a_page_are_unique(folder: Path) -> None:
    names = re.findall(r'\bid="([^"]+)"', page(folder / "run"))
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("sources", [["run"], ["run", "other"], ["study"]])
def test_nothing_is_asked_of_anybody(folder: Path, sources: list[str]) -> None:
    html = page(*(folder / name for name in sources))
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|file:)""", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "<script" not in html.lower()


def test_the_values_below_a_figure_are_those_of_the_run(folder: Path) -> None:
    html, rows = page(folder / "run"), read_run(folder / "run").rows
    figure = re.split(r"(?=<h3>)", html.split("<h3>Losses</h3>")[1])[0]
    head = re.findall(r'<th scope="col">(.*?)</th>', figure)
    assert head == ["step", "training, dropout on", "training, dropout off", "validation"]
    found = re.findall(
        r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', figure
    )
    assert len(found) >= 3
    lowest = {}
    for step, *cells in found:
        row = next(row for row in rows if row["step"] == int(step))
        names = ("train/loss", "train/loss_dropout_off", "val/loss")
        for name, cell in zip(names, cells, strict=True):
            value, _, note = cell.partition(" ")
            assert value == ("–" if row.get(name) is None else f"{row[name]:.4f}")
            if note:
                assert note == "(lowest)"
                lowest[name] = row[name]
    assert lowest["val/loss"] == min(row["val/loss"] for row in rows if "val/loss" in row)
    assert len(lowest) == 3


def test_a_page_of_figures_that_say_their_values_stays_small(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    long = [{**rows[step % len(rows)], "step": step} for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, long)))
    html = page(run)
    said = re.findall(r'<g class="points".*?</g></g>', html, re.DOTALL)
    tables = re.findall(r'<details class="values".*?</details>', html, re.DOTALL)
    assert min(len(said), len(tables)) > 8
    assert len("".join([*said, *tables])) < 45_000


def test_several_runs_are_compared_by_what_differs(folder: Path) -> None:
    html = page(folder / "run", folder / "other")
    assert "2 runs compared" in html
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", html))
    assert rows["seed"] == "1337"
    assert "model.n_embd" not in rows


def test_a_study_is_shown_with_what_is_above_noise(folder: Path) -> None:
    html = page(folder / "study")
    assert "1 of 2 runs done" in html
    assert "<td>+0.1000</td><td>0.0500 to 0.1500</td><td>yes</td>" in html
    assert "best_val_loss over dropout.rate" in html


def test_hostile_text_is_shown_and_not_obeyed(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "other", tmp_path / "run")
    (run / "samples" / "step-00000008.txt").write_text(HOSTILE + "\x00\ud800"[:1])
    rows = (run / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(rows[-1]), f"dropout/{HOSTILE}": 0.1}
    (run / "metrics.jsonl").write_text("\n".join([*rows, json.dumps(row)]))
    plan = json.loads((run / "plan.json").read_text())
    plan["dropout"][0] |= {"site": HOSTILE, "rate": 0.5}
    (run / "plan.json").write_text(json.dumps(plan))
    for html in (page(run), page(folder / "study")):
        assert "<script" not in html
        assert "<img" not in html
        assert not re.search(r"[\x00\x1b\u202e]", html)
        assert "alert(1)" in html


def test_damaged_files_are_named_and_the_rest_is_shown(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "val/loss": null}\n{"step": "x"}\n[1]\n{"step": 10, "val/l')
    (run / "plan.json").unlink()
    (run / "config.yaml").write_text("model: {n_layer: [1, 2")
    (run / "env.json").write_text("[" * 100_000)
    (run / "eval" / "knockout-val-step-00000008.json").write_text('{"kinds": {"head": 3}}')
    (run / "eval" / "calibration-val-step-00000009.json").write_text("no json")
    html = page(run)
    assert "metrics.jsonl: 3 damaged lines left out" in html
    assert "plan.json: No such file" in html
    assert "env.json: damaged" in html
    assert "calibration-val-step-00000009.json: damaged" in html
    assert "<h3>Losses</h3>" in html
    assert "<h3>Reliability</h3>" in html
    assert "Without some of its heads" not in html


def test_values_of_the_wrong_kind_are_named(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "other", tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"train_tokens": None}))
    (run / "config.yaml").write_text("model: 3")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "elapsed_seconds": "x", "val/loss": 10**400}))
    html = page(run)
    assert "plan.json or config.yaml: damaged" in html
    assert "metrics.jsonl: damaged" in html
    assert "<h3>Losses</h3>" in html
    (tmp_path / "study.json").write_text('{"points": 3, "runs": 4}')
    with pytest.raises(ConfigError, match="study.json: damaged"):
        page(tmp_path)


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert "Not evaluated" in page(tmp_path)


def test_what_is_no_run_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run or study directory"):
        page(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        page(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="a study is reported alone"):
        page(folder / "run", folder / "study")


def test_without_matplotlib_the_page_says_how_to_get_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "available", lambda: False)
    html = page(folder / "run")
    assert "pip install matplotlib" in html
    assert "The network and its dropout sites" in html
    assert "<h3>Losses</h3>" not in html
    assert "pip install matplotlib" in page(folder / "study")


def test_a_page_that_cannot_be_written_fails_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("report.html: No space left on device")

    def bug(*_: Any) -> None:
        raise RuntimeError("cannot draw")

    monkeypatch.setattr(report, "page_of", bug)
    unsaid: list[str] = []
    report.add_report(folder / "run", unsaid.append)
    assert unsaid == ["no report: RuntimeError: cannot draw"]
    monkeypatch.undo()
    monkeypatch.setattr(report.storage, "write_text", full)
    said: list[str] = []
    report.add_report(folder / "run", said.append)
    assert said == ["no report: report.html: No space left on device"]


def test_the_drawing_names_every_site_and_fills_those_that_drop() -> None:
    rates = dict.fromkeys(EVERYWHERE.rates(), 0.0) | {"head": 0.2}
    svg = network(rates, 3)
    assert set(re.findall(r'class="\w+-name">(\w+)', svg)) == set(rates)
    assert re.findall(r'class="live-name">(.*?)<', svg) == ["head 0.2"]
    assert "× 3" in svg


@pytest.mark.parametrize("sources", [["run"], ["other"], ["run", "other"], ["study"]])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_every_figure_and_complains_of_nothing(
    folder: Path, browser: Any, sources: list[str], width: int
) -> None:
    path = folder / f"{'-'.join(sources)}.html"
    report.write_page([folder / name for name in sources], path)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    papers = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(svg => {"
            "const box = svg.getBoundingClientRect(); const marks = svg.getBBox();"
            "return [box.width, box.height, marks.width, box.right]})"
        )
        assert boxes
        for wide, high, drawn, right in boxes:
            assert min(wide, high, drawn) > 50
            assert right <= width
        assert browser.execute_script("return performance.getEntriesByType('resource')") == []
        papers.append(
            browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
    assert papers[0] != papers[1]
    assert browser.get_log("browser") == []


def test_a_point_shows_itself_under_the_pointer_and_says_its_value(
    folder: Path, browser: Any
) -> None:
    from selenium.webdriver import ActionChains

    path = folder / "pointed.html"
    report.write_page([folder / "run"], path)
    size = {"width": 1400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    seen = "return [getComputedStyle(arguments[0]).fillOpacity, arguments[0].textContent]"
    point = browser.find_elements("css selector", ".points circle")[0]
    assert browser.execute_script(seen, point)[0] == "0"
    ActionChains(browser).move_to_element(point).perform()
    opacity, words = browser.execute_script(seen, point)
    assert float(opacity) > 0.3
    first = read_run(folder / "run").rows[0]
    assert words == f"step {first['step']}: training, dropout on {first['train/loss']:.4f}"
    assert (
        10 < browser.execute_script("return arguments[0].getBoundingClientRect().width", point) < 16
    )

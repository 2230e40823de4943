"""The page: everything on it, nothing from outside, whatever the files hold."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import EVERYWHERE
from pages import HOSTILE, make_sources

from gptlite.config.dropout import SITES
from gptlite.errors import ConfigError, StorageError
from gptlite.report import page as report
from gptlite.report.network import network
from gptlite.runs.directory import hold_directory
from gptlite.runs.results import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("report"))


def page(*sources: Path) -> str:
    return report.render(report.page_of(list(sources)))


def test_a_page_of_a_run_has_everything(folder: Path) -> None:
    html = page(folder / "run")
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert titles[:4] == ["Loss over the run", "Learning rate", "Gradient norm", "Throughput"]
    for title in (
        *("The network and its dropout sites", "Without some of its heads"),
        *("Without some of its layers", "Importance of heads", "Reliability"),
        *("Averaging passes with dropout on", "Loss by position", "step 4", "step 8"),
    ):
        assert title in titles
    assert "There is more to measure" not in html
    assert "<summary>Config</summary>" in html
    assert "<summary>Environment</summary>" in html
    assert "best validation loss" in html
    assert 'class="verdict"' in html
    assert "Not readable" not in html


def test_what_was_not_measured_is_said_with_the_command(folder: Path) -> None:
    html = page(folder / "other")
    assert re.search("gptlite eval --run \\S+ --suite all, and then gptlite report", html)


def test_the_same_files_make_the_same_bytes(folder: Path) -> None:
    assert page(folder / "run") == page(folder / "run")


def test_names_within_a_page_are_unique(folder: Path) -> None:
    names = re.findall(r'\bid="([^"]+)"', page(folder / "run"))
    assert len(names) == len(set(names))


@pytest.mark.parametrize("sources", [["run"], ["run", "other"], ["study"]])
def test_nothing_is_asked_of_anybody(folder: Path, sources: list[str]) -> None:
    html = page(*(folder / name for name in sources))
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|file:)""", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "<script" not in html.lower()


def test_the_values_below_a_figure_are_those_of_the_run(folder: Path) -> None:
    html, rows = page(folder / "run"), read_run(folder / "run").rows
    figure = re.split(r"(?=<h3>)", html.split("<h3>Loss over the run</h3>")[1])[0]
    head = re.findall(r'<th scope="col">(.*?)</th>', figure)
    assert head == ["step", "training, dropout on", "training, dropout off", "validation"]
    cell = "<td[^>]*>(.*?)</td>"
    found = re.findall(rf'<tr><th scope="row"[^>]*>(.*?)</th>{cell}{cell}{cell}', figure)
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
    assert html.count('class="tip"') > 100
    assert len(html) < 400_000


def test_several_runs_are_compared_by_what_differs(folder: Path) -> None:
    html = page(folder / "run", folder / "other")
    assert "2 runs compared" in html
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td[^>]*>(.*?)</td>", html))
    assert rows["seed"] == "1337"
    assert "model.n_embd" not in rows


def test_a_study_is_shown_with_what_is_above_noise(folder: Path) -> None:
    html = page(folder / "study")
    assert "1 of 2 runs done" in html
    cells = re.sub("<td[^>]*>", "<td>", html)
    assert "<td>+0.1000</td><td>0.0500 to 0.1500</td><td>yes</td>" in cells
    assert "Best validation loss over dropout.rate" in html


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
    assert "<h3>Loss over the run</h3>" in html
    assert "<h3>Reliability</h3>" in html
    assert "Without some of its heads" not in html


def test_values_of_the_wrong_kind_are_named(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "other", tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"train_tokens": None}))
    (run / "config.yaml").write_text("model: 3")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "elapsed_seconds": "x", "val/loss": 10**400}) + "\n")
        file.write(json.dumps({"step": 10, "val/loss": 0.1, "val/bits_per_byte": "x"}))
    html = page(run)
    assert "plan.json or config.yaml: damaged" in html
    assert "metrics.jsonl: damaged" in html
    assert "<h3>Loss over the run</h3>" in html
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


def test_a_run_at_work_is_told_so(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "other", tmp_path / "run")
    (run / "summary.json").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(rows[:4]) + "\n")
    with hold_directory(run):
        html = page(run)
        assert "Still training: step 4 of 8, as of 20" in html
        assert '<meta http-equiv="refresh"' in html
        assert "<h2>So far: " in html
    html = page(run)
    assert "Ended early, at step 4 of 8. Go on with: gptlite train --resume" in html
    assert "Still training" not in html + page(folder / "other")
    assert 'http-equiv="refresh"' not in html


def test_a_run_that_has_logged_nothing_yet_has_a_page(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "other", tmp_path / "run")
    for name in ("summary.json", "metrics.jsonl"):
        (run / name).unlink()
    with hold_directory(run):
        assert "Training has begun; nothing is logged yet" in page(run)


def test_the_head_says_what_was_trained(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    environment = json.loads((run / "env.json").read_text())
    environment["arguments"] = ["train", "--config", "my run.yaml"]
    (run / "env.json").write_text(json.dumps(environment))
    html = page(run)
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    plan = read_run(folder / "run").plan
    assert f"text.txt: {plan['train_tokens']:,} tokens for training" in facts["Text"]
    assert facts["Tokenizer"] == f"char, {plan['vocab_size']} tokens, 1.00 bytes of text per token"
    assert facts["Model"].endswith("2 layers, 2 heads, 16 wide, context 16")
    assert facts["Dropout"].startswith("0.3 at token, embedding, key")
    assert facts["Seed"] == "1337"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", facts["Started"])
    assert re.fullmatch(r"8 updates, [\d.]+ epochs, 0:0\d of training, finished", facts["Length"])
    assert facts["Command"].startswith("<code><span>gptlite</span> <span>train</span>")
    assert "<dt>Dropout</dt><dd>none</dd>" in page(folder / "plain")


def test_runs_of_other_tokenizers_are_compared_in_bits_per_byte(folder: Path) -> None:
    html = page(folder / "run", folder / "bytes")
    assert "These runs have different tokenizers" in html
    assert "<h3>Validation loss in bits per byte</h3>" in html
    assert "<h3>Validation loss</h3>" not in html
    alike = page(folder / "run", folder / "other")
    assert "different tokenizers" not in alike
    assert "<h3>Validation loss</h3>" in alike


def test_runs_on_other_texts_are_compared_with_a_warning(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder / "other", tmp_path / "elsewhere")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("text.txt", "another.txt"))
    assert "validated on different texts" in page(folder / "run", other)
    assert "validated on different texts" not in page(folder / "run", folder / "other")


@pytest.mark.parametrize("sources", [["run"], ["other"], ["run", "bytes"], ["study"]])
def test_no_section_is_empty(folder: Path, sources: list[str]) -> None:
    html = page(*(folder / name for name in sources))
    assert not re.search(r"<h2>[^<]*</h2>\s*(<div class=\"figures\">\s*</div>\s*)?</section>", html)
    for figure in re.findall("<figure.*?</figure>", html, re.DOTALL):
        assert "<svg" in figure
        assert re.search(r"<figcaption>\s*\S", figure)
    for body in re.findall("<tbody>(.*?)</tbody>", html, re.DOTALL):
        assert "<tr>" in body
    assert not re.search(r"<(pre|p|dd|small|ul)[^>]*>\s*</\1>", html)


def test_the_drawing_names_every_site_and_fills_those_that_drop() -> None:
    rates = dict.fromkeys(EVERYWHERE.rates(), 0.0) | {"head": 0.2}
    svg = network(rates, 3)
    boxes = re.findall(r'<rect x="138"[^>]*fill="([^"]*)"[^>]*/><text[^>]*>(\w+)( [\d.]+)?<', svg)
    assert {site for _, site, _ in boxes} == set(rates)
    assert {(site, rate) for fill, site, rate in boxes if fill == "var(--c2)"} == {("head", " 0.2")}
    assert "3 × this layer" in svg


def test_the_drawing_has_two_residual_sums_and_the_shape_at_every_site() -> None:
    svg = network(dict.fromkeys(SITES, 0.1), 3)
    assert re.findall(r'anchor="middle">\+<', svg) == ['anchor="middle">+<'] * 2
    after = re.findall(r">(\w+) 0\.1</text><text[^>]*>([A-Z ]+)<", svg)
    assert {(site, shape.replace(" ", "")) for site, shape in after} == {
        (name, kind.tensor) for name, kind in SITES.items()
    }

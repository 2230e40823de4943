"""The page of a study that has run: its answer, its curves, and every suite that was asked for."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RATES, Bench, Workshop

from gptlite.report import page as report
from gptlite.report.axes import COLORS
from gptlite.report.series import rate_color


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(Workshop(tmp_path_factory.mktemp("study")))
    made.run(**RATES, evaluate=["loss", "calibration", "mc-dropout"], fast=True)
    return made


def page(folder: Path) -> str:
    return report.render(report.page_of([folder]))


def test_it_opens_with_its_answer(bench: Bench) -> None:
    html = page(bench.out)
    first = html.index("<h2>")
    answer = re.findall("<h2>(.*?)</h2>", html)[0]
    assert html.index('class="verdict"') < first < html.index("<figure")
    assert re.match(r"Rate 0(\.3)? is best|Cannot tell rate 0\.3 from rate 0", answer)


def test_every_suite_that_was_asked_for_is_there(bench: Bench) -> None:
    html = page(bench.out)
    captions = re.findall(r"<caption>(.*?)<small>", html)
    for suite in ("loss", "calibration", "mc-dropout"):
        assert f"Suite {suite}" in captions
    assert "Suite knockout" not in captions
    found = json.loads((bench.out / "study.json").read_text())
    mean = found["points"][0]["metrics"]["calibration.ece"]["mean"]
    assert f"{mean:.4f} ± " in html


def test_a_suite_that_gave_nothing_is_named(bench: Bench, tmp_path: Path) -> None:
    folder = shutil.copytree(bench.out, tmp_path / "study")
    found = json.loads((folder / "study.json").read_text())
    found["metrics"] = [name for name in found["metrics"] if not name.startswith("mc-dropout")]
    for point in found["points"]:
        kept = point["metrics"].items()
        point["metrics"] = {k: v for k, v in kept if not k.startswith("mc-dropout")}
    (folder / "study.json").write_text(json.dumps(found))
    html = page(folder)
    assert "mc-dropout was asked for and gave no number" in html
    assert "Suite mc-dropout" not in html


def test_learning_curves_are_means_over_the_seeds(bench: Bench) -> None:
    figure = html_of(page(bench.out), "Validation loss")
    found = json.loads((bench.out / "study.json").read_text())
    for rate in (0, 0.3):
        logs = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in bench.out.glob(f"runs/rate={rate}-seed-*/metrics.jsonl")
        ]
        last = [log[-1]["val/loss"] for log in logs]
        assert len(last) == len(found["seeds"]) == 2
        said = f"rate {rate} {sum(last) / 2:.4f} ({min(last):.4f} to {max(last):.4f})"
        assert said in figure


def test_a_rate_has_its_colour_in_every_figure(bench: Bench) -> None:
    html = page(bench.out)
    color = re.escape(COLORS[rate_color(0.3)])
    curves = html_of(html, "Validation loss")
    assert re.search(rf'<text[^>]*fill="{color}"[^>]*>rate 0.3<', curves)
    for title in (
        "Best validation loss over dropout.rate",
        "Best validation loss: difference to the baseline",
    ):
        assert re.search(rf'(fill|stroke)="{color}"', html_of(html, title))


def test_a_difference_is_drawn_with_its_sides(bench: Bench) -> None:
    forest = html_of(page(bench.out), "Best validation loss: difference to the baseline")
    assert "← helps" in forest
    assert "hurts →" in forest


def test_points_of_other_tokenizers_are_compared_in_bits_per_byte(
    bench: Bench, tmp_path: Path
) -> None:
    folder = shutil.copytree(bench.out, tmp_path / "study")
    for path in folder.glob("runs/rate=0.3*/plan.json"):
        plan = json.loads(path.read_text())
        path.write_text(json.dumps({**plan, "vocab_size": 256}))
    html = page(folder)
    assert "Points that are compared have different tokenizers" in html
    assert "Measured: loss.bits_per_byte" in html
    assert "bits per byte" in html_of(html, "Validation loss")


def test_a_study_without_its_runs_has_a_page(bench: Bench, tmp_path: Path) -> None:
    """As where other machines have trained them."""
    shutil.copy(bench.out / "study.json", tmp_path)
    html = page(tmp_path)
    assert "<h2>Learning curves</h2>" not in html
    assert "Suite loss" in html


def html_of(html: str, title: str) -> str:
    """The figure with this title."""
    figures: list[Any] = re.findall("<figure.*?</figure>", html, re.DOTALL)
    return next(figure for figure in figures if f"<h3>{title}</h3>" in figure)

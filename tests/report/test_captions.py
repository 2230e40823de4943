"""What is said under a figure follows from the numbers in it; what has none is not there."""

import re
from typing import Any

import pytest

from gptlite.report import figures
from gptlite.report.figures import Figure
from gptlite.report.tiles import tiles_of
from gptlite.report.verdict import compare_with_training, nats, verdict
from gptlite.runs.results import RunFiles


def run_of(rows: list[dict[str, Any]], **more: Any) -> RunFiles:
    return RunFiles("run", rows=rows, **more)


def losses(val: list[float], train: list[float], rate: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            **{"step": 100 * number, "epoch": number, "elapsed_seconds": 60.0 * number},
            **{"train/loss": t + 0.1, "train/loss_dropout_off": t, "val/loss": v},
            **{"dropout/embedding": rate, "lr": 1e-3 / number, "grad_norm": 2.0 / number},
        }
        for number, (v, t) in enumerate(zip(val, train, strict=True), 1)
    ]


def only(found: Any) -> Figure:
    (figure,) = found
    return figure


def by_position(y: list[float]) -> str:
    run = run_of([], evals={"loss": {"loss_by_position": y}})
    return only(figures.positions(run)).caption


def test_a_curve_that_falls_is_called_otherwise_than_one_that_rises() -> None:
    falling, rising, level = (
        [start + step * n for n in range(8)] for start, step in ((4, -0.2), (2, 0.2), (3, 0))
    )
    assert by_position(falling).startswith("Context helps by 1.30 nats: 4.00 nats")
    assert by_position(rising).startswith("The loss rises with more context, by 1.30 nats")
    assert by_position(level).startswith("Context makes no difference")
    turning = by_position([4.0, 2.5, 2.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    assert turning.startswith("Context helps by 1.50 nats")
    assert "lowest in the quarter that ends at token 4, 2.00" in turning
    assert "lowest" not in by_position(falling)


def test_a_run_without_dropout_is_not_said_to_have_it_on() -> None:
    with_, without = (
        only(figures.losses(run_of(losses([3, 2, 2.5], [3, 1.9, 1.5], rate))))
        for rate in (0.1, 0.0)
    )
    assert "training, dropout on" in with_.svg
    assert "With dropout on" in with_.caption
    assert "dropout on" not in without.svg + without.wide_svg + without.caption


def test_the_loss_is_told_with_its_best_step_and_its_gap() -> None:
    figure = only(figures.losses(run_of(losses([3, 2, 2.5], [3, 1.9, 1.5]))))
    assert "lowest at step 200: 2.000 nats" in figure.caption
    assert "step 300, it is 0.50 higher" in figure.caption
    assert "1.00 nats above that of training text: the gap, shaded" in figure.caption
    assert "probability of 13.5%" in figure.caption  # exp(-2)
    for svg in (figure.svg, figure.wide_svg):
        assert "best 2.000 at step 200" in svg
        assert "gap +1.0000" in svg


def test_a_loss_that_still_falls_is_not_said_to_have_risen() -> None:
    figure = only(figures.losses(run_of(losses([3, 2.5, 2], [3, 2.5, 2.004]))))
    assert "higher" not in figure.caption
    assert "level with that of training text" in figure.caption


@pytest.mark.parametrize(
    ("val", "train"),
    [
        ([3, 2, 2.5], [3, 1.9, 1.5]),  # overfitting
        ([4, 3, 2], [4, 3, 1.98]),  # underfitting
        ([3, 2, 2, 2], [3, 1.9, 1.7, 1.6]),  # a wide gap
        ([3, 2, 2, 2], [3, 2, 2, 2.004]),  # the training text is harder
    ],
)
def test_the_gap_in_the_tile_is_the_gap_in_the_verdict(
    val: list[float], train: list[float]
) -> None:
    rows = losses(val, train)
    said = verdict(rows, {}, {})
    (tile,) = (t for t in tiles_of(run_of(rows), said) if t.name == "gap to training text")
    assert said.gap == pytest.approx(val[-1] - train[-1])
    assert f"step {rows[-1]['step']}" in tile.about
    if tile.value != "0.00":
        assert f"{tile.value} nats" in said.found
    assert "-0.00" not in tile.value + said.found


def test_a_zero_has_no_sign() -> None:
    assert [nats(value) for value in (-0.004, 0.004, -0.006, 1.005)] == [
        "0.00",
        "0.00",
        "-0.01",
        "1.00",
    ]
    assert compare_with_training(-0.001) == "level with that of training text"
    assert compare_with_training(0.1).startswith("0.10 nats above")
    assert compare_with_training(-0.1).startswith("0.10 nats below")


def test_the_learning_rate_and_the_norms_are_told_in_numbers() -> None:
    run = run_of(losses([3, 2, 2], [3, 2, 2]), config={"optim": {"grad_clip": 1.0}})
    assert (
        "Highest at step 100 (0.001), 0.000333 at the last"
        in only(figures.learning_rate(run)).caption
    )
    assert "1 of 3 logged updates were above 1" in only(figures.gradient_norm(run)).caption


def test_what_was_not_logged_has_no_figure() -> None:
    rows = [{"step": 1, "val/loss": 2.0}]
    titles = [f.title for _, group in figures.run_figures(run_of(rows)) for f in group]
    assert titles == ["Loss over the run"]
    assert not any(group for _, group in figures.run_figures(run_of([])))


def test_rates_are_drawn_over_time_and_depth_only_where_they_differ() -> None:
    def sites(by_layer: list[float]) -> dict[str, Any]:
        return {"dropout": [{"site": "mlp_output", "rate": 0.2, "by_layer": by_layer}]}

    def titles(by_layer: list[float], rates: list[float]) -> set[str]:
        rows = [{"step": n, "dropout/mlp_output": rate} for n, rate in enumerate(rates)]
        found = dict(figures.run_figures(run_of(rows, plan=sites(by_layer))))["Dropout"]
        return {figure.title for figure in found} - {"The network and its dropout sites"}

    assert titles([0.2, 0.2], [0.2, 0.2]) == set()
    assert titles([0.1, 0.2], [0.2, 0.2]) == {"Dropout rates over depth"}
    assert titles([0.2, 0.2], [0.2, 0.1]) == {"Dropout rates over the run"}


def test_averaging_is_called_worse_where_it_is() -> None:
    for difference, word in ((-0.01, "better"), (0.01, "worse")):
        found = {
            **{"passes": [1, 5], "loss": [2.1, 2.0], "deterministic_loss": {"value": 2.05}},
            "averaged_minus_deterministic": {"value": difference},
        }
        caption = only(figures.passes(run_of([], evals={"mc-dropout": found}))).caption
        assert f"0.0100 nats {word} than" in caption


def test_calibration_says_in_which_direction() -> None:
    def caption(confidence: float) -> str:
        found = {
            **{"confidence": confidence, "accuracy": 0.5, "ece": {"value": 0.1}},
            "reliability": [{"confidence": confidence, "accuracy": 0.5, "count": 7}],
        }
        return only(figures.draw_calibration(run_of([], evals={"calibration": found}))).caption

    assert "surer than it is right" in re.sub("less surer", "", caption(0.7))
    assert "less sure than it is right" in caption(0.3)
    assert "as sure as it is right" in caption(0.501)

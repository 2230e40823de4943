"""The sentence at the head of a study's page."""

from typing import Any

import pytest

from gptlite.report.answer import answer_of, direction_of, seeds_needed
from gptlite.studies.comparison import mark_above_noise, mean_over_seeds, paired_difference

Values = dict[str, list[float]]


def study_of(
    points: Values, bases: dict[str, str], metric: str = "best_val_loss"
) -> dict[str, Any]:
    """As studies/study.py makes it of the values of each seed."""
    comparisons = [
        {"metric": metric, "label": label, "against": base}
        | paired_difference(points[label], points[base])
        for label, base in bases.items()
    ]
    mark_above_noise(comparisons)
    return {
        "comparisons": comparisons,
        "points": [
            {"label": label, "metrics": {metric: mean_over_seeds(values)}}
            for label, values in points.items()
        ],
        "runs": [
            {"label": label, "seed": seed, "state": "done", "metrics": {metric: value}}
            for label, values in points.items()
            for seed, value in enumerate(values)
        ],
    }


def test_the_baseline_is_best_where_all_others_cost() -> None:
    points = {"rate=0": [2.0, 2.1, 1.9], "rate=0.2": [2.171, 2.27, 2.069]}
    found = answer_of(study_of(points, {"rate=0.2": "rate=0"}), "best_val_loss")
    assert found.title == "Rate 0 is best; rate 0.2 costs 0.17 ± 0.0025 nats (3 seeds, above noise)"
    assert any("lower is better" in line for line in found.lines)


def test_the_best_of_several_is_named_with_its_gain() -> None:
    points = {
        "rate=0": [2.0, 2.1, 1.9],
        "rate=0.1": [1.901, 2.0, 1.799],
        "rate=0.2": [1.951, 2.05, 1.849],
    }
    bases = {"rate=0.1": "rate=0", "rate=0.2": "rate=0"}
    found = answer_of(study_of(points, bases), "best_val_loss")
    assert found.title.startswith("Rate 0.1 is best: it gains 0.1 ± ")
    assert found.title.endswith("nats on rate 0 (3 seeds, above noise)")


def test_what_is_within_noise_is_not_called_best() -> None:
    points = {"rate=0": [2.0, 2.1, 1.9], "rate=0.2": [2.02, 2.07, 1.93]}
    found = answer_of(study_of(points, {"rate=0.2": "rate=0"}), "best_val_loss")
    assert found.title.startswith("Cannot tell rate 0.2 from rate 0: the difference is +0.0067 ± ")
    assert "3 seeds, within noise" in found.title
    assert "more seeds" in found.title


def test_one_seed_decides_nothing() -> None:
    found = answer_of(study_of({"a": [2.0], "b": [1.0]}, {"b": "a"}), "best_val_loss")
    assert found.title.startswith("Cannot tell b from a")
    assert "run at least two more" in found.title


def test_what_costs_is_named_beside_what_nobody_can_tell() -> None:
    points = {
        "rate=0": [2.0, 2.1, 1.9],
        "rate=0.1": [2.02, 2.07, 1.93],
        "rate=0.5": [3.001, 3.1, 2.899],
    }
    bases = {"rate=0.1": "rate=0", "rate=0.5": "rate=0"}
    title = answer_of(study_of(points, bases), "best_val_loss").title
    assert title.startswith("Cannot tell rate 0.1 from rate 0")
    assert "But rate 0.5 costs 1 ± " in title


def test_each_setting_has_its_own_answer() -> None:
    points = {
        "tokens=10, rate=0": [3.0, 3.1, 2.9],
        "tokens=10, rate=0.1": [2.001, 2.1, 1.899],
        "tokens=99, rate=0": [2.0, 2.1, 1.9],
        "tokens=99, rate=0.1": [3.001, 3.1, 2.899],
    }
    bases = {f"tokens={n}, rate=0.1": f"tokens={n}, rate=0" for n in (10, 99)}
    found = answer_of(study_of(points, bases), "best_val_loss")
    assert found.title == "It depends: 2 settings, and not one answer"
    assert found.lines[0].startswith("tokens 10: Rate 0.1 is best: it gains 1 ± ")
    assert found.lines[1].startswith("tokens 99: Rate 0 is best; rate 0.1 costs 1 ± ")
    level = {label: [2.0, 2.1, 1.9] if "=0.1" in label else [2.02, 2.07, 1.93] for label in points}
    assert answer_of(study_of(level, bases), "best_val_loss").title == (
        "Cannot tell in any of the 2 settings"
    )
    same = {**points, **{f"tokens=99, rate={r}": points[f"tokens=10, rate={r}"] for r in (0, 0.1)}}
    assert answer_of(study_of(same, bases), "best_val_loss").title == (
        "Rate 0.1 is best in all 2 settings"
    )


def test_more_accuracy_is_better() -> None:
    points = {"a": [0.5, 0.51, 0.49], "b": [0.6011, 0.61, 0.59]}
    title = answer_of(study_of(points, {"b": "a"}, "loss.accuracy"), "loss.accuracy").title
    assert title.startswith("B is best: it gains 0.1 ± ")
    assert "nats" not in title


def test_a_study_at_work_says_so() -> None:
    study = study_of({"a": [2.0, 2.1], "b": [1.0, 1.11]}, {"b": "a"})
    study["runs"].append({"label": "b", "seed": 9, "state": "missing", "metrics": {}})
    assert any("4 of 5 runs are done" in line for line in answer_of(study, "best_val_loss").lines)
    assert answer_of({}, "best_val_loss").title == "Nothing to compare yet"


def test_the_smaller_the_difference_the_more_seeds() -> None:
    large, small = [0.1, 0.2, 0.12], [0.01, 0.11, 0.03]
    few, many = seeds_needed(large, 1), seeds_needed(small, 1)
    assert few is not None
    assert many is not None
    assert 1 <= few < many
    assert (seeds_needed(small, 10) or 0) > many
    assert seeds_needed([0.1], 1) is None
    assert seeds_needed([0.1, -0.1], 1) is None


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("best_val_loss", -1),
        ("loss.generalisation_gap", -1),
        ("loss.accuracy", 1),
        ("knockout.kinds.head.mean.random.retained_area", 1),
        ("calibration.ece", -1),
        ("best_step", 0),
    ],
)
def test_which_way_a_metric_is_better(metric: str, direction: int) -> None:
    assert direction_of(metric) == direction

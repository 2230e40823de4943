"""What is said of a run's losses, for curves drawn by hand."""

from typing import Any

import pytest

from gptlite.planning.regularisation import Scale, pick_decay
from gptlite.report.verdict import verdict
from gptlite.runs.results import number

CONFIG = {"optim": {"weight_decay": 0.1}}


def rows(val: list[float], train: list[float], rate: float = 0.0, epochs: float = 10) -> Any:
    n = len(val)
    return [
        {
            **{"step": 100 * (i + 1), "epoch": epochs * (i + 1) / n, "val/loss": v},
            **{"train/loss_dropout_off": t, "dropout/embedding": rate},
        }
        for i, (v, t) in enumerate(zip(val, train, strict=True))
    ]


def test_a_rising_validation_loss_is_overfitting_since_its_minimum() -> None:
    found = verdict(rows([3.0, 2.0, 2.2, 2.5], [3.0, 1.9, 1.5, 1.0]), CONFIG, {"epochs": 10})
    assert found.title == "Overfitting since step 200"
    assert "step 200 (epoch 5.0)" in found.found
    assert "0.50 nats since" in found.found
    assert "gap to training text has grown to 1.50" in found.found
    assert any("Try dropout.rate" in line for line in found.advice)
    assert any("now 0.1" in line for line in found.advice)


def test_a_decay_is_named_where_it_was_measured() -> None:
    """With Muon, by text and model; else only that there is more."""
    plan = {"epochs": 20, "steps": 300, "train_tokens": 30_000}
    model = {"n_embd": 64}
    muon = {"optim": {"name": "muon", "lr": 0.01, "weight_decay": 0.1}, "model": model}
    rising = rows([3.0, 2.0, 2.2, 2.5], [3.0, 1.9, 1.5, 1.0])
    best, _ = pick_decay(Scale(30_000, 15, 64), 0.01)
    (told,) = (line for line in verdict(rising, muon, plan).advice if "weight_decay" in line)
    assert f"optim.weight_decay 0.1: the rule of train --data says {best:g} for" in told
    adamw = {**muon, "optim": {**muon["optim"], "name": "adamw"}}
    assert any("more weight decay (now 0.1)" in x for x in verdict(rising, adamw, plan).advice)
    enough = {**muon, "optim": {**muon["optim"], "weight_decay": best}}
    assert any(f"(now {best})" in x for x in verdict(rising, enough, plan).advice)


def test_who_drops_already_is_told_to_drop_more() -> None:
    found = verdict(rows([3.0, 2.0, 2.2], [3.0, 1.9, 1.5], rate=0.1), CONFIG, {"epochs": 10})
    assert any("Raise the dropout rates" in line for line in found.advice)


def test_a_rise_within_the_noise_is_no_overfitting() -> None:
    found = verdict(rows([3.0, 2.0, 2.0, 2.01], [3.0, 1.99, 1.98, 1.98]), CONFIG, {"epochs": 10})
    assert found.title == "Levelled off"


def test_a_loss_that_still_falls_is_underfitting() -> None:
    found = verdict(
        rows([4.0, 3.5, 3.0, 2.5], [4.0, 3.5, 3.0, 2.48], epochs=0.5), CONFIG, {"epochs": 0.5}
    )
    assert found.title == "Underfitting"
    assert "0.50 nats in the last quarter" in found.found
    assert any("needs no dropout" in line for line in found.advice)
    dropping = verdict(
        rows([4.0, 3.5, 3.0, 2.5], [4.0, 3.5, 3.0, 2.5], rate=0.2), CONFIG, {"epochs": 0.5}
    )
    assert any("try rate 0" in line for line in dropping.advice)


def test_a_wide_gap_is_named_before_the_loss_rises() -> None:
    found = verdict(rows([3.0, 2.0, 2.0, 2.0], [3.0, 1.9, 1.7, 1.6]), CONFIG, {"epochs": 10})
    assert found.title == "A wide gap, not yet overfitting"
    assert "0.40 nats above" in found.found
    assert not any("dropout" in line for line in found.advice)
    often = verdict(
        rows([3.0, 2.0, 2.0, 2.0], [3.0, 1.9, 1.7, 1.6], epochs=30), CONFIG, {"epochs": 30}
    )
    assert any("try dropout (rate 0.1), " in line for line in often.advice)


def test_a_loss_that_was_not_finite_is_passed_over() -> None:
    some = rows([3.0, 2.0], [3.0, 1.99])
    some[1]["val/loss"] = None
    assert verdict(some, {}, {}).title == "Levelled off"
    assert verdict([{"step": 1, "val/loss": None}], {}, {}).title == "Not evaluated"
    assert verdict([], {}, {}).advice == []


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), float("inf"), [1]])
def test_what_is_no_finite_number_is_none(value: Any) -> None:
    assert number(value) is None

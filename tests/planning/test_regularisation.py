"""The one rule, as auto, recipe, audit and verdict ask it."""

import pytest

from gptlite.planning.regularisation import (
    LEAST_DECAY,
    MOST_DECAY,
    advise_decay,
    pick_decay,
    pick_rate,
)


@pytest.mark.parametrize(
    ("epochs", "rate"), [(0.5, 0.0), (13, 0.0), (14, 0.1), (70, 0.1), (1000, 0.2)]
)
def test_the_rate_follows_the_epochs(epochs: float, rate: float) -> None:
    found, why = pick_rate(epochs)
    assert found == rate
    assert why.startswith(f"{epochs:.3g} epochs: ")


def test_the_less_text_the_more_decay() -> None:
    found = [pick_decay(tokens, 0.01)[0] for tokens in (1e9, 400_000, 40_000, 10_000, 1)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (LEAST_DECAY, MOST_DECAY)


def test_what_was_measured_is_the_share_of_an_update() -> None:
    """lr times weight_decay stays the same."""
    at_usual, _ = pick_decay(40_000, 0.01)
    assert pick_decay(40_000, 0.02)[0] == pytest.approx(at_usual / 2, rel=0.05)
    assert f"{at_usual * 0.01:.1%} of a weight" in pick_decay(40_000, 0.01)[1]


def test_only_a_decay_that_is_far_off_is_worth_a_word() -> None:
    best, _ = pick_decay(40_000, 0.01)
    for decay, told in ((best, False), (best / 2.4, False), (best / 3, True), (best * 3, True)):
        assert (advise_decay("muon", 0.01, decay, 40_000) is not None) == told
    assert advise_decay("adamw", 0.01, best / 100, 40_000) is None
    assert advise_decay("muon", 0.0, best, 40_000) is None

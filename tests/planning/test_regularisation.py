"""The one rule, as auto, recipe, audit and verdict ask it."""

import pytest

from gptlite.planning.regularisation import (
    LEAST_SHARE,
    MOST_SHARE,
    Scale,
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


def scale(tokens: float, n_embd: int = 64) -> Scale:
    return Scale(tokens, tokens / 2048, n_embd)


def test_the_less_text_and_the_wider_the_model_the_more_decay() -> None:
    found = [pick_decay(scale(tokens), 0.01)[0] for tokens in (1e9, 4e5, 4e4, 1e4, 1)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (100 * LEAST_SHARE, 100 * MOST_SHARE)
    narrow, wide = (pick_decay(scale(4e5, n_embd), 0.01)[0] for n_embd in (64, 256))
    assert wide == pytest.approx(4 * narrow, rel=0.02)


def test_as_much_is_taken_in_a_pass_however_many_updates_it_has() -> None:
    many, few = (pick_decay(Scale(4e5, updates, 64), 0.01)[0] for updates in (400, 100))
    assert few == pytest.approx(4 * many, rel=0.05)


def test_what_was_measured_is_the_share_of_an_update() -> None:
    """lr times weight_decay stays the same."""
    at_usual, why = pick_decay(scale(40_000), 0.01)
    assert pick_decay(scale(40_000), 0.02)[0] == pytest.approx(at_usual / 2, rel=0.05)
    assert why.startswith("40,000 tokens of text and a model 64 wide: ")
    assert f"{at_usual * 0.01:.1%} of a weight" in why


def test_only_a_decay_that_is_far_off_is_worth_a_word() -> None:
    of = scale(40_000)
    best, _ = pick_decay(of, 0.01)
    for decay, told in ((best, False), (best / 2.4, False), (best / 3, True), (best * 3, True)):
        assert (advise_decay("muon", 0.01, decay, of) is not None) == told
    assert advise_decay("adamw", 0.01, best / 100, of) is None
    assert advise_decay("muon", 0.0, best, of) is None

"""From a text and a model to weight decay and dropout: the one rule, as it was measured. No torch.

Measured with the models of `train --data` (docs/dropout-study.md, "What a recipe should choose").
"""

import math

RATES = (
    (13, 0.0, "dropout costs up to about 13"),
    (math.inf, 0.1, "the best rate from about 20 on, with weight decay and without"),
)
"""Up to so many epochs, the rate, and why."""
DECAY_AT_ONE, DECAY_EXPONENT = 1.8, -0.4
"""The best weight decay at a learning rate of 0.01 where the text has one token per parameter, and
how it falls with more."""
LEAST_DECAY, MOST_DECAY = 0.1, 8.0
"""Between which it was measured."""
CLOSE = 2.0
"""Factor by which a decay may miss the best one before a word is said of it."""


def pick_rate(epochs: float) -> tuple[float, str]:
    """The dropout rate for so many epochs, and why."""
    rate, why = next((rate, why) for most, rate, why in RATES if epochs <= most)
    return rate, f"{epochs:.3g} epochs: {why}"


def pick_decay(tokens_per_parameter: float, lr: float) -> tuple[float, str]:
    """The weight decay for so many different tokens of text per parameter, and why.

    An update takes lr times it of a weight; that share is what was measured.
    """
    at_usual = min(
        MOST_DECAY, max(LEAST_DECAY, DECAY_AT_ONE * tokens_per_parameter**DECAY_EXPONENT)
    )
    decay = float(f"{at_usual * 0.01 / lr:.2g}")
    share = f"{decay * lr:.2g} of a weight in an update"
    return decay, f"{tokens_per_parameter:.2g} tokens of text per parameter: {share}"


def advise_decay(
    optimizer: str, lr: float, weight_decay: float, tokens_per_parameter: float
) -> str | None:
    """A word on a weight decay that is far from the best; of Muon, with which it was measured."""
    if optimizer != "muon" or lr == 0:
        return None
    best, why = pick_decay(tokens_per_parameter, lr)
    if best / CLOSE <= weight_decay <= best * CLOSE:
        return None
    return f"optim.weight_decay {weight_decay:g}: about {best:g} was best at {why}"

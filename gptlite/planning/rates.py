"""From how often a text is seen to a dropout rate: the one rule, as it was measured. No torch."""

import math

RATES = (
    (13, 0.0, "dropout costs up to about 13, as measured in short runs"),
    (40, 0.1, "the best rate of short runs at about 20"),
    (math.inf, 0.2, "the best rate of short runs at about 60"),
)
"""Up to so many epochs, the rate, and why: docs/dropout-study.md, section 1."""


def pick_rate(epochs: float) -> tuple[float, str]:
    """The rate for so many epochs, and why."""
    rate, why = next((rate, why) for most, rate, why in RATES if epochs <= most)
    return rate, f"{epochs:.3g} epochs: {why}"

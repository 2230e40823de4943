"""From a text, a model and the passes to weight decay and dropout: the one rule. No torch.

Both were measured with the models of `train --data` and with GPT-2's (docs/dropout-study.md).
"""

import math
from typing import NamedTuple

RATES = (
    (13, 0.0, "up to about 13 epochs, dropout costs more than it gains"),
    (70, 0.1, "0.1 was the best rate at 20 epochs, and as good as any at 60"),
    (math.inf, 0.2, "at 60 epochs 0.2 was no worse than 0.1, and it holds back more"),
)
"""Up to so many epochs, the rate, and why."""
DECAYED_IN_A_PASS = 0.58
"""Share of a weight that the best decay takes in one pass over 40,000 tokens of text, at the full
learning rate, from a model 64 wide. It grows with the width and with the fourth root of the text;
Wang and Aitchison (2405.13698) found it the same for all sizes of text, and larger for larger
models."""
LEAST_SHARE, MOST_SHARE = 0.001, 0.04
"""Of a weight in an update. On texts of 20 kB more was worse (docs/own-text.md), though not in the
study, where validation text is of another place."""
CLOSE = 2.5
"""Factor by which a decay may miss the best one before a word is said of it."""


def pick_rate(epochs: float) -> tuple[float, str]:
    """The dropout rate for so many epochs, and why."""
    rate, why = next((rate, why) for most, rate, why in RATES if epochs <= most)
    return rate, f"{epochs:.3g} epochs: {why}"


class Scale(NamedTuple):
    """What the best weight decay depends on."""

    text_tokens: float
    """Of the training text."""
    updates: float
    """That read this text once."""
    n_embd: int


def pick_decay(scale: Scale, lr: float) -> tuple[float, str]:
    """The weight decay for this text and model, and why.

    An update takes lr times it of a weight; that share is what was measured.
    """
    in_a_pass = DECAYED_IN_A_PASS * (scale.n_embd / 64) * (scale.text_tokens / 40_000) ** 0.25
    share = min(MOST_SHARE, max(LEAST_SHARE, in_a_pass / scale.updates))
    return float(f"{share / lr:.2g}"), f"{describe(scale)}: {share:.1%} of a weight in an update"


def describe(scale: Scale) -> str:
    return f"{scale.text_tokens:,.0f} tokens of text and a model {scale.n_embd} wide"


def advise_decay(optimizer: str, lr: float, weight_decay: float, scale: Scale) -> str | None:
    """A word on a weight decay that is far from the best; of Muon, with which it was measured."""
    if optimizer != "muon" or lr == 0:
        return None
    best, _ = pick_decay(scale, lr)
    if best / CLOSE <= weight_decay <= best * CLOSE:
        return None
    return (
        f"optim.weight_decay {weight_decay:g}: the rule of train --data says {best:g} for "
        f"{describe(scale)}"
    )

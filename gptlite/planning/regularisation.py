"""From a text and the passes over it to weight decay and dropout: the one rule. No torch.

The decay was measured with the models of `train --data`, the rates with GPT-2's as well
(docs/dropout-study.md).
"""

import math

RATES = (
    (13, 0.0, "up to about 13 epochs, dropout costs more than it gains"),
    (70, 0.1, "0.1 was the best rate at 20 epochs, and as good as any at 60"),
    (math.inf, 0.2, "at 60 epochs 0.2 was no worse than 0.1, and it holds back more"),
)
"""Up to so many epochs, the rate, and why."""
DECAY_OF_A_MILLION = 0.64
"""The best weight decay at a learning rate of 0.01 for a million tokens of text; it falls with the
square root of more."""
LEAST_DECAY, MOST_DECAY = 0.1, 8.0
"""Within what was measured."""
CLOSE = 2.5
"""Factor by which a decay may miss the best one before a word is said of it."""


def pick_rate(epochs: float) -> tuple[float, str]:
    """The dropout rate for so many epochs, and why."""
    rate, why = next((rate, why) for most, rate, why in RATES if epochs <= most)
    return rate, f"{epochs:.3g} epochs: {why}"


def pick_decay(text_tokens: float, lr: float) -> tuple[float, str]:
    """The weight decay for so many tokens of training text, and why.

    An update takes lr times it of a weight; that share is what was measured.
    """
    at_usual = DECAY_OF_A_MILLION * math.sqrt(1e6 / text_tokens)
    at_usual = min(MOST_DECAY, max(LEAST_DECAY, at_usual))
    decay = float(f"{at_usual * 0.01 / lr:.2g}")
    share = f"{decay * lr:.1%} of a weight in an update"
    return decay, f"{text_tokens:,.0f} tokens of text: {share}"


def advise_decay(optimizer: str, lr: float, weight_decay: float, text_tokens: float) -> str | None:
    """A word on a weight decay that is far from the best; of Muon, with which it was measured."""
    if optimizer != "muon" or lr == 0:
        return None
    best, tokens = pick_decay(text_tokens, lr)[0], f"{text_tokens:,.0f} tokens of text"
    if best / CLOSE <= weight_decay <= best * CLOSE:
        return None
    return (
        f"optim.weight_decay {weight_decay:g}: the rule of train --data says {best:g} for {tokens}"
    )

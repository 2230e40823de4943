"""From logits to a token: a chain of pure functions; the last takes one number in [0, 1)."""

import math

import torch
from torch import Tensor

from gptlite.config.run import SampleConfig

LARGEST = 1e30
"""Logits and factors stay below it, so that no option gives infinity less infinity."""
ROUNDING = 1e-6
"""What sums and quotients of probabilities in float32 may miss a bound by, and still reach it."""


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens (CTRL, arXiv:1909.05858)."""
    penalty = min(max(penalty, 1 / LARGEST), LARGEST)
    punished = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, punished.clamp(-LARGEST, LARGEST), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits; the others become -inf. Ties at the edge stay."""
    edge = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < edge, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities sum to p (arXiv:1904.09751)."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    reached = ordered.softmax(-1).cumsum(-1) >= p - ROUNDING
    beyond = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    return logits.masked_fill(beyond.gather(-1, index.argsort(-1)), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
    probability = logits.softmax(-1)
    least = (p - ROUNDING) * probability.amax(-1, keepdim=True)
    return logits.masked_fill(probability < least, -math.inf)


def probabilities(
    logits: Tensor, seen: Tensor | None, options: SampleConfig, unseen: Tensor | None = None
) -> Tensor:
    """(B, V) logits → (B, V) probabilities; `seen` (B, V) marks tokens already in the text
    (None: a penalty has nothing to find), `unseen` (V,) those that the training text never had."""
    if unseen is not None:
        logits = logits.masked_fill(unseen, -math.inf)
    if options.repetition_penalty != 1 and seen is not None:
        logits = penalise(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    if options.temperature < 1e-4:  # the likeliest would become infinite
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(options.temperature, 1 / LARGEST)
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits.softmax(-1)


def draw(probability: Tensor, chance: Tensor) -> Tensor:
    """The token where the summed probability passes `chance` in [0, 1); (B, V), (B,) → (B,).

    On the CPU: sums are made in float64, which Apple's GPUs do not have.
    """
    summed = probability.cpu().double().cumsum(-1)
    token = (summed <= (chance * summed[:, -1])[:, None]).sum(-1)
    return token.clamp(max=probability.shape[-1] - 1)

"""How much single units of a trained model matter, and how evenly that is spread.

The importance of a unit is what the loss rises by without it, in nats. If no unit matters too much,
importance is spread (low Gini, many effective units), and units cover for each other: without
several at once the loss rises by more than the sum of their importances (backup above 1).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from gptlite.core.model import GPT
from gptlite.measure.intervals import (
    Floats,
    debiased_interval,
    holm,
    mean_per_target,
    ratio,
    resamples,
    student_tail,
    weighted_sums,
    withhold,
)
from gptlite.measure.units import Subject, blocks, random_orders

CRITICAL_NATS = 0.01
"""What a critical unit costs at least; less is of no use to anyone, however certain."""
SET_SIZES = (2, 4, 8)
REPEATABLE = 0.5
"""Of `split_half`, from where on it is told how importance is spread: below, what tells units apart
in half of the rows is more noise than units."""
NO_COST = "alone they cost nothing that is certain"


def gini(x: Floats) -> Floats:
    """0 if all units matter alike, near 1 if one does all; over the last axis, negatives as 0."""
    x = np.sort(np.maximum(x, 0), axis=-1)
    n = x.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * (x * np.arange(1, n + 1)).sum(-1) / (n * x.sum(-1)) - (n + 1) / n


def effective_share(x: Floats) -> Floats:
    """The number of equal units with the entropy of these importances, over all there are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.maximum(x, 0) / np.maximum(x, 0).sum(-1, keepdims=True)
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(-1)
    return np.where(np.isfinite(p).all(-1), np.exp(entropy) / x.shape[-1], np.nan)


def top_share(x: Floats) -> Floats:
    """What the most important 1 % of the units (at least one) have of all importance."""
    x = np.sort(np.maximum(x, 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x[..., -math.ceil(x.shape[-1] / 100) :].sum(-1) / x.sum(-1)


SPREADS = {
    "gini": gini,
    "effective_share": effective_share,
    "top_1_percent_share": top_share,
}
"""From 0 to 1; noise in the importances moves each of them one way, as it does the largest."""


def importance(subject: Subject, singles: Floats, n_layer: int) -> dict[str, Any]:
    """What single units cost and how that is spread; `singles` (N, R) of `Subject.singles`."""
    rise, targets = singles - subject.base, subject.n_targets
    increase = rise.sum(1) / targets.sum()
    rows = resamples(len(targets), "importance rows")
    replicates = weighted_sums(rows, rise.T) / weighted_sums(rows, targets)[:, None]
    certain = is_critical(rise, targets)
    per_layer = increase.reshape(n_layer, -1) if len(increase) % n_layer == 0 else increase[None]
    repeatable = split_half(rise, targets)
    return {
        **describe_spread(increase, replicates, len(targets), repeatable),
        "largest": debiased_interval(float(increase.max()), replicates.max(1), len(targets)),
        "mean": mean_per_target(rise.mean(0), targets, "importance rows"),
        "critical_units": int(certain.sum()),
        "split_half": repeatable,
        "loss_increase": np.round(per_layer, 7).tolist(),
    }


def describe_spread(
    increase: Floats, replicates: Floats, n: int, repeatable: float | None
) -> dict[str, Any]:
    """How importances (N,) are spread, unless it is noise that spreads them."""
    if repeatable is None:
        reason = "it takes two rows of text and two units that differ"
        return dict.fromkeys(SPREADS, withhold(reason))
    if repeatable < REPEATABLE:
        reason = f"halves of the text disagree (split_half {repeatable:.2f})"
        return dict.fromkeys(SPREADS, withhold(reason))
    if (increase <= 0).all():
        return dict.fromkeys(SPREADS, withhold(NO_COST))
    return {
        name: clip_share(debiased_interval(float(f(increase)), f(replicates), n))
        for name, f in SPREADS.items()
    }


def clip_share(found: dict[str, Any]) -> dict[str, Any]:
    """An estimate of what lies between 0 and 1, which it may miss by a little."""
    return {name: None if x is None else min(1.0, max(0.0, x)) for name, x in found.items()}


def is_critical(rise: Floats, targets: Floats) -> Any:
    """Units (N,) that cost more than CRITICAL_NATS, and more than nothing at p < 0.01: Student's t
    over rows, Holm's correction over units."""
    n, increase = len(targets), rise.sum(1) / targets.sum()
    if n < 2:
        return np.zeros(len(rise), dtype=bool)
    squares = ((rise - increase[:, None] * targets) ** 2).sum(1)
    error = np.sqrt(squares * n / (n - 1)) / targets.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(increase / error, posinf=np.inf, neginf=-np.inf)
    return holm(student_tail(t, n - 1), 0.01) & (increase > CRITICAL_NATS)


def split_half(rise: Floats, targets: Floats) -> float | None:
    """Correlation over units between importances from every other row: how repeatable they are."""
    halves = [rise[:, i::2].sum(1) / targets[i::2].sum() for i in (0, 1) if targets[i::2].sum()]
    if len(halves) < 2 or min(half.std() for half in halves) == 0:
        return None
    return float(np.corrcoef(*halves)[0, 1])


def backup(
    subject: Subject, kind: str, singles: Floats, n_sets: int, fills: Sequence[Tensor] | None = None
) -> dict[str, Any]:
    """Rise of the loss without several units at once over the sum of what each alone costs."""
    orders = random_orders(f"{kind} sets", len(singles), n_sets)
    rise, found = singles - subject.base, {}
    for size in (size for size in SET_SIZES if size < len(singles)):
        removed = np.argsort(orders, axis=1) < size  # (sets, N)
        together = subject.row_nats(kind, torch.from_numpy(removed), fills) - subject.base
        apart = weighted_sums(removed, rise)  # (sets, R)
        found[str(size)] = ratio(together.sum(0), apart.sum(0), "backup rows", NO_COST)
    return found


def variation(x: Tensor) -> float:
    """Standard deviation over mean: 0 if all are equal."""
    return float(x.std(correction=0) / x.mean())


@torch.no_grad()
def norm_variation(model: GPT) -> dict[str, Any]:
    """How unequal units are in their weights, per layer: variation of |w_in| |w_out| of neurons and
    of |W_v W_o| of heads. Dropout makes them equal in linear networks (Mianjy et al. 2018)."""
    config = model.config
    found: dict[str, list[float]] = {"neuron": [], "head": []}
    width, group = config.head_width, config.n_head // config.kv_heads
    for block in blocks(model):
        up, down = block.mlp.up.weight.float(), block.mlp.down.weight.float()
        into = up.view(-1, config.mlp_width, config.n_embd).square().sum((0, 2)).sqrt()
        found["neuron"].append(variation(into * vector_norm(down, dim=0)))
        values = block.attention.qkv.weight.float()[-config.kv_heads * width :]
        values = values.view(config.kv_heads, width, -1).repeat_interleave(group, 0)
        out = block.attention.output.weight.float().view(-1, config.n_head, width).transpose(0, 1)
        found["head"].append(variation(vector_norm((out @ values).flatten(1), dim=1)))
    return found


def dimensionality(subject: Subject) -> dict[str, Any]:
    """In how many directions activations vary, over how many there are, per layer.

    participation: (sum l)^2 / sum l^2 of the eigenvalues l of their covariance; effective_rank:
    exp of the entropy of l / sum l (Roy and Vetterli 2007). Of the MLP and of the residual stream.
    """
    every = blocks(subject.model)
    modules: dict[str, list[Any]] = {
        "neuron": [block.mlp.drop_activation for block in every],
        "residual": [*every],
    }
    found = {}
    for name, places in modules.items():
        both = [spectrum(x, subject.real) for x in subject.outputs(places)]
        found[name] = {
            "participation": [participation for participation, _ in both],
            "effective_rank": [rank for _, rank in both],
        }
    return found


def spectrum(x: Tensor, real: Tensor | None) -> tuple[float, float]:
    """Participation ratio and effective rank of (B, T, C), over min(C, tokens).

    On the CPU: Apple's GPUs have neither float64 nor singular values.
    """
    x = (x.flatten(0, 1) if real is None else x[real]).cpu().double()
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    p = values / values.sum()
    n = min(x.shape[1], len(x) - 1)
    entropy = -torch.special.xlogy(p, p).sum()
    return float(1 / p.square().sum() / n), float(entropy.exp() / n)

"""Curves of the loss over the fraction of units that is removed (Morcos et al. 2018,
arXiv:1803.06959), and what is left of a model's skill and of what the units do together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlite.measure.intervals import (
    Floats,
    doubt_divisor,
    interval,
    resamples,
    weighted_sums,
    withhold,
)
from gptlite.measure.units import Subject, random_orders

NO_SKILL = "the model may be no better than guessing by token frequency"
NO_USE = "all of them together are not certainly of use"
NEVER_HALF = "even without any of them more than half of the skill is left"


def n_removed(fraction: float, n: int) -> int:
    return int(fraction * n + 1e-9)


def curve(
    subject: Subject, kind: str, orders: Any, fractions: Sequence[float], fills: Any = None
) -> Floats:
    """Nats of each row without the first units of each order: orders (K, N) → (F, K, R)."""
    rank = np.argsort(orders, axis=1)
    counts = [n_removed(fraction, rank.shape[1]) for fraction in fractions]
    masks = np.stack([rank < count for count in counts]).reshape(-1, rank.shape[1])
    distinct, which = np.unique(masks, axis=0, return_inverse=True)
    nats = subject.row_nats(kind, torch.from_numpy(distinct), fills)
    return nats[which.reshape(-1)].reshape(len(counts), len(rank), -1)


def curve_replicates(nats: Floats, n_targets: Floats, name: str) -> Floats:
    """Losses of a curve (F, K, R) over resampled rows and masks, (RESAMPLES, F)."""
    rows = resamples(nats.shape[2], f"{name} rows")
    masks = resamples(nats.shape[1], f"{name} masks") / nats.shape[1]
    sums = np.stack([(weighted_sums(masks, at) * rows).sum(1) for at in nats], 1)
    return sums / weighted_sums(rows, n_targets)[:, None]


def retained_skill(losses: Floats, unigram: Floats) -> Floats:
    """Skill left: 1 with nothing removed, 0 where the model knows no more than the unigrams.

    `losses` (..., F) whose first is with nothing removed, `unigram` (...).
    """
    start = unigram - losses[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (unigram[..., None] - losses) / start[..., None]


def half_at(skill: Floats, fractions: Sequence[float]) -> Floats:
    """Fraction removed at which half the skill is gone, (...); infinite where it never is."""
    x = np.asarray(fractions)
    below = skill < 0.5
    at = below.argmax(-1).clip(1)
    before = np.take_along_axis(skill, at[..., None] - 1, -1)[..., 0]
    after = np.take_along_axis(skill, at[..., None], -1)[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (before - 0.5) / (before - after)
    return np.where(below.any(-1), x[at - 1] + part * (x[at] - x[at - 1]), np.inf)


def knockout(
    subject: Subject,
    kind: str,
    importance: Floats,
    unigram_nats: Floats,
    fractions: Sequence[float],
    n_masks: int,
    fills: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Loss against the fraction of units removed, and what is left of the model's skill.

    `importance` (N,) ranks the units, from other text than the subject's; `unigram_nats` (R,).
    """
    orders = {
        "random": random_orders(kind, len(importance), n_masks),
        "most_first": np.argsort(-importance, kind="stable")[None],
        "least_first": np.argsort(importance, kind="stable")[None],
    }
    nats = curve(subject, kind, np.concatenate(list(orders.values())), fractions, fills)
    total, found = subject.n_targets.sum(), {}
    no_skill = doubt_divisor(unigram_nats - subject.base, "knockout rows", NO_SKILL)
    no_use = doubt_divisor(nats[-1, 0] - nats[0, 0], "knockout rows", NO_USE)
    unigrams = curve_replicates(unigram_nats[None, None], subject.n_targets, "knockout")[:, 0]
    for name, part in zip(orders, np.split(nats, (n_masks, n_masks + 1), axis=1), strict=True):
        losses = part.mean(1).sum(1) / total
        replicates = curve_replicates(part, subject.n_targets, "knockout")
        n = part.shape[2] if part.shape[1] == 1 else min(part.shape[1:])
        bounds = [
            interval(loss, drawn, n)
            for loss, drawn in zip(losses.tolist(), replicates.T, strict=True)
        ]
        skill = retained_skill(losses, unigram_nats.sum() / total)
        skills = retained_skill(replicates, unigrams)
        found[name] = {
            "loss": losses.tolist(),
            "low": [bound["low"] for bound in bounds],
            "high": [bound["high"] for bound in bounds],
            **describe_skill(skill, skills, fractions, n, no_skill),
            **describe_contribution(losses, replicates, fractions, n, no_use),
        }
    return found


def contribution_left(losses: Floats) -> Floats:
    """What is left of what all units of a kind do together: 1 with nothing removed, 0 with all.

    Unlike retained skill it does not rise if the kind merely goes unused: (L(1) - L(f)) / (L(1) -
    L(0)) for `losses` (..., F) from fraction 0 to 1.
    """
    last = losses[..., -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (last - losses) / (last - losses[..., :1])


def describe_contribution(
    losses: Floats, replicates: Floats, fractions: Any, n: int, doubt: str | None
) -> dict[str, Any]:
    """What is left of the kind's contribution along a curve, and the area under it unless there is
    `doubt` that its units together are of use."""
    left, others = contribution_left(losses), contribution_left(replicates)
    return {
        "contribution": interval(
            float(losses[-1] - losses[0]), replicates[:, -1] - replicates[:, 0], n
        ),
        "contribution_left": left.tolist(),
        "contribution_area": withhold(doubt)
        if doubt
        else interval(float(np.trapezoid(left, fractions)), np.trapezoid(others, fractions), n),
    }


def describe_skill(
    skill: Floats, skills: Floats, fractions: Any, n: int, doubt: str | None
) -> dict[str, Any]:
    """Retained skill along a curve (F,), its replicates (RESAMPLES, F), and unless there is `doubt`
    that the model has any, the area under it and where half of it is gone."""
    if doubt:
        return {
            "retained": skill.tolist(),
            "retained_area": withhold(doubt),
            "half_at": withhold(doubt),
        }
    area, areas = np.trapezoid(skill, fractions), np.trapezoid(skills, fractions)
    half = float(half_at(skill, fractions))
    return {
        "retained": skill.tolist(),
        "retained_area": interval(float(area), areas, n),
        "half_at": interval(half, half_at(skills, fractions), n)
        if np.isfinite(half)
        else withhold(NEVER_HALF),
    }

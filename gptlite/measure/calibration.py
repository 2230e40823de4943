"""Whether a model's probabilities mean what they say, and what averaging over dropout adds.

Expected calibration error (Guo et al. 2017): tokens are sorted into bins by the probability of
their likeliest guess, and the share of right guesses is compared with it. Of a calibrated model
the two differ by chance, in one direction or the other, so the direction is taken from other rows
than the difference: chance then counts for nothing on average.

MC dropout (Gal and Ghahramani 2016) keeps dropout on and averages several passes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlite.config.run import RunConfig
from gptlite.core.dropout import evaluating
from gptlite.core.masks import sample_keys
from gptlite.core.model import GPT, to_device
from gptlite.core.precision import precision
from gptlite.data.batches import IGNORED, Batch
from gptlite.errors import DivergedError
from gptlite.keys import key
from gptlite.measure.intervals import Floats, mean_per_target, withhold

BINS = 15


class Guesses(NamedTuple):
    """The likeliest token at each of n targets."""

    row: NDArray[np.int64]
    """(n,) which row of text."""
    confidence: Floats
    """(n,) its probability."""
    correct: Floats
    """(n,) 1 if it came."""
    brier: Floats
    """(n,) squared distance of all probabilities from what came (Brier 1950): 0 to 2."""


@torch.no_grad()
def guesses(model: GPT, batches: Iterable[Batch], run: RunConfig) -> Guesses:
    device = model.token_embedding.weight.device
    parts, n_rows = [], 0
    with evaluating(model), precision(run):
        for batch in batches:
            inputs, targets, real = to_device(batch, device)
            scored = targets != IGNORED
            p = model(inputs, real)[scored].float().softmax(-1)  # (n, V)
            confidence, best = p.max(-1)
            wanted = targets[scored]
            chance = p.gather(1, wanted[:, None])[:, 0]
            brier = p.square().sum(1) - 2 * chance + 1
            row = scored.nonzero()[:, 0] + n_rows
            parts.append((row, confidence, best == wanted, brier))
            n_rows += len(inputs)
    found = [torch.cat(x).cpu().numpy() for x in zip(*parts, strict=True)]
    if not np.isfinite(found[1]).all():
        raise DivergedError("probabilities are not finite")
    return Guesses(found[0], *(x.astype(np.float64) for x in found[1:]))


def calibration(found: Guesses) -> dict[str, Any]:
    """ECE with equal and with equally filled bins, Brier score, and the reliability curve."""
    even = np.linspace(0, 1, BINS + 1)
    filled = np.quantile(found.confidence, even)
    sums = bin_predictions(found, even)
    count, confidence, correct = sums.sum(0)
    brier = np.bincount(found.row, weights=found.brier).astype(np.float64)
    with np.errstate(invalid="ignore"):
        curve = np.stack([confidence / count, correct / count], 1)
    return {
        "ece": calibration_error(sums),
        "adaptive_ece": calibration_error(bin_predictions(found, filled)),
        "brier": mean_per_target(brier, sums[:, 0].sum(1), "calibration rows"),
        "accuracy": float(correct.sum() / count.sum()),
        "confidence": float(confidence.sum() / count.sum()),
        "targets": int(count.sum()),
        "reliability": [
            {"confidence": said, "accuracy": was, "count": int(n)}
            for (said, was), n in zip(curve.tolist(), count, strict=True)
            if n
        ],
    }


def bin_predictions(found: Guesses, edges: Floats) -> Floats:
    """Count, confidence and correct guesses summed per row and bin, (rows, 3, bins)."""
    n = len(edges) - 1
    place = np.searchsorted(edges[1:-1], found.confidence, side="left")
    at, n_rows = found.row * n + place, int(found.row.max()) + 1
    weights = (np.ones_like(found.correct), found.confidence, found.correct)
    sums = [np.bincount(at, weights=w, minlength=n_rows * n).reshape(n_rows, n) for w in weights]
    return np.stack(sums, 1)


def calibration_error(sums: Floats) -> dict[str, Any]:
    """Mean distance between confidence and accuracy over targets, of `bin_predictions`.

    Each half of the rows says for the other which of the two is larger in each bin; the ends of the
    interval are means of those of both, as the halves are not independent.
    """
    halves = sums[::2], sums[1::2]
    both = []
    for half, other in (halves, halves[::-1]):
        if len(half) and len(other):
            gap = half[:, 1] - half[:, 2]  # (rows, bins)
            direction = np.sign((other[:, 1] - other[:, 2]).sum(0))
            gaps = (gap * direction).sum(1)
            both.append(mean_per_target(gaps, half[:, 0].sum(1), "calibration rows"))
    if len(both) < 2:
        return withhold("the text has only one row")
    known = {name: [found[name] for found in both] for name in ("value", "low", "high")}
    return {
        name: None if None in values else float(np.mean(values)) for name, values in known.items()
    }


def mc_dropout(
    model: GPT,
    batches: Sequence[Batch],
    run: RunConfig,
    passes: Sequence[int],
    watch: Callable[[Iterable[int], str], Iterable[int]] = lambda work, _: work,
) -> dict[str, Any]:
    """Loss of predictions averaged over passes with dropout on, beside the plain prediction."""
    return average_passes(sum_passes(model, batches, run, passes, watch), passes)


@torch.no_grad()
def sum_passes(
    model: GPT,
    batches: Sequence[Batch],
    run: RunConfig,
    passes: Sequence[int],
    watch: Callable[[Iterable[int], str], Iterable[int]],
) -> dict[str, Floats]:
    """Sums per row: targets, nats of the plain prediction (`deterministic`) and of the mean of so
    many passes (`1`, `2` ...), entropies."""
    torch.manual_seed(key(run.seed, "mc-dropout") >> 1)  # for native masks only
    device = model.token_embedding.weight.device
    sums: dict[str, list[Tensor]] = {}
    n_rows = 0
    for batch in batches:
        inputs, targets, real = to_device(batch, device)
        rows = np.arange(n_rows, n_rows := n_rows + len(inputs))
        scored = torch.from_numpy(batch.targets != IGNORED)
        mean, spent = torch.zeros(()), torch.zeros(())
        plain = predict(model, run, inputs, real, None)
        parts = {"targets": scored, "deterministic": nats(plain, targets)}
        for number in watch(range(max(passes)), "passes with dropout"):
            p = predict(model, run, inputs, real, sample_keys(run.seed, number, rows).to(device))
            mean, spent = mean + (p - mean) / (number + 1), spent + entropy(p) / max(passes)
            if number + 1 in passes:
                parts[str(number + 1)] = nats(mean, targets)
        parts["predictive_entropy"] = entropy(mean)
        parts["mutual_information"] = (entropy(mean) - spent).clamp(min=0)
        for name, values in parts.items():
            sums.setdefault(name, []).append((values.cpu().double() * scored).sum(1))
    found = {name: torch.cat(parts).numpy() for name, parts in sums.items()}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise DivergedError("probabilities are not finite")
    return found


def predict(
    model: GPT, run: RunConfig, inputs: Tensor, real: Tensor | None, keys: Tensor | None
) -> Tensor:
    """Probabilities (B, T, V) of one pass with the masks that `keys` name; None: dropout off."""
    with evaluating(model, dropout_active=keys is not None), precision(run):
        return model(inputs, real, samples=keys).float().softmax(-1)


def average_passes(sums: dict[str, Floats], passes: Sequence[int]) -> dict[str, Any]:
    """Sums per row as means per target; differences in pairs, below 0 where averaging helps."""
    targets, plain = sums["targets"], sums["deterministic"]
    over = {name: mean_per_target(x, targets, "mc-dropout rows") for name, x in sums.items()}
    gains = [mean_per_target(sums[str(n)] - plain, targets, "mc-dropout rows") for n in passes]
    return {
        "deterministic_loss": over["deterministic"],
        "averaged_loss": over[str(max(passes))],
        "averaged_minus_deterministic": gains[-1],
        "predictive_entropy": over["predictive_entropy"],
        "mutual_information": over["mutual_information"],
        "passes": list(passes),
        "loss": [over[str(n)]["value"] for n in passes],
        "minus_deterministic": gains,
        "targets": int(targets.sum()),
    }


def nats(p: Tensor, targets: Tensor) -> Tensor:
    """(B, T) of probabilities (B, T, V), 0 where there is no target."""
    chosen = p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -chosen.clamp(min=torch.finfo(p.dtype).tiny).log() * (targets != IGNORED)


def entropy(p: Tensor) -> Tensor:
    """Nats, (B, T) of (B, T, V)."""
    return -torch.special.xlogy(p, p).sum(-1)

"""Cross-entropy in nats: from logits, or from features without ever holding all logits.

With a vocabulary of 50k the logits of a batch are larger than the model. In parts, each part's
gradients are made while its logits are there, so nothing is computed twice.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlite.data.batches import IGNORED

PART_BYTES = 1 << 26
"""Largest block of float32 logits made at a time; below it all are made at once."""
FLOAT16_ROWS = 1024
"""In float16 no gradient of more rows is summed in one product: its slopes are not scaled yet, and
a sum over many tokens could pass 65504."""


def nats_of(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in float32 whatever the logits' precision; 0 where there is no target."""
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per target of a batch by itself; 0 if it has none."""
    return nats_of(logits, targets, "sum") / max(1, int((targets != IGNORED).sum()))


class Lesson(NamedTuple):
    """What teachers say of a batch."""

    log_probabilities: Tensor
    """(B, T, V), at this temperature."""
    weight: float
    """Share of the loss that is the distance from them."""
    temperature: float


def total_lesson(logits: Tensor, targets: Tensor, lesson: Lesson) -> Tensor:
    """Sum over all targets of the nats of the text and the divergence from the teachers."""
    own = (logits.float() / lesson.temperature).log_softmax(-1)
    apart = F.kl_div(own, lesson.log_probabilities, reduction="none", log_target=True).sum(-1)
    apart = (apart * (targets != IGNORED)).sum() * lesson.temperature**2
    return lesson.weight * apart + (1 - lesson.weight) * nats_of(logits, targets, "sum")


def total_nats(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over all targets: features (B, T, C), output matrix (V, C), targets (B, T) → ()."""
    rows = PART_BYTES // (4 * len(weight))
    if targets.numel() <= rows or torch.compiler.is_compiling():
        return nats_of(F.linear(features, weight), targets, "sum")
    kind = features.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
    if dtype == torch.float16:
        rows = min(rows, FLOAT16_ROWS)
    parts = max(1, rows), dtype
    total: Tensor = _InParts.apply(features.flatten(0, 1), weight, targets.flatten(), *parts)
    return total


class _InParts(torch.autograd.Function):
    """`rows` of (N, C) features at a time; sums are kept in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        total = torch.zeros((), device=x.device)
        gradients = None
        if any(ctx.needs_input_grad):
            gradients = torch.empty_like(x), torch.zeros_like(weight)
        # One block for all parts: new ones of this size would be asked of the system each time.
        full = x.new_empty(min(rows, len(x)), len(weight), dtype=torch.float32)
        rounded = full if dtype == torch.float32 else torch.empty_like(full, dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(x), rows):
                at = slice(start, start + rows)
                part, wanted = x[at].to(dtype), targets[at, None]
                scored, wanted = wanted != IGNORED, wanted.clamp(min=0)
                logits, slope = full[: len(part)], rounded[: len(part)]
                torch.mm(part, w.T, out=slope)
                if rounded is not full:
                    logits.copy_(slope)
                logits.sub_(logits.amax(-1, keepdim=True))
                own = logits.gather(1, wanted)
                sums = logits.exp_().sum(-1, keepdim=True)
                total += ((sums.log() - own) * scored).sum()
                if gradients is None:
                    continue
                # The slope of the logits: softmax - one-hot.
                logits.mul_(scored / sums).scatter_add_(1, wanted, -scored.float())
                if rounded is not full:
                    slope.copy_(logits)
                gradients[0][at] = slope @ w
                gradients[1].add_(slope.T @ part)
        ctx.save_for_backward(*(gradients or ()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return x.mul_(gradient), weight.mul_(gradient), None, None, None

"""Cross-entropy in nats: from logits, or from features without ever holding all logits.

With a vocabulary of 50k the logits of a batch are larger than the model. In parts, each part's
gradients are made while its logits are there, so nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptlite.data import IGNORED

PART_BYTES = 1 << 27
"""Largest block of float32 logits made at a time; below it all are made at once."""


def nats_of(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in float32 whatever the logits' precision; 0 where there is no target."""
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per target of a batch by itself; 0 if it has none."""
    return nats_of(logits, targets, "sum") / max(1, int((targets != IGNORED).sum()))


def total_nats(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over all targets: features (B, T, C), output matrix (V, C), targets (B, T) → ()."""
    rows = PART_BYTES // (4 * len(weight))
    if targets.numel() <= rows or torch.compiler.is_compiling():
        return nats_of(F.linear(features, weight), targets, "sum")
    kind = features.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
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
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(x), rows):
                at = slice(start, start + rows)
                part, wanted = x[at].to(dtype), targets[at, None]
                scored = wanted != IGNORED
                logs = (part @ w.T).float().log_softmax(-1)  # (rows, V)
                wanted = wanted.clamp(min=0)
                total -= (logs.gather(1, wanted) * scored).sum()
                if gradients is not None:  # of the logits: softmax - one-hot
                    minus = torch.full_like(wanted, -1, dtype=logs.dtype)
                    slope = logs.exp_().scatter_add_(1, wanted, minus).mul_(scored).to(dtype)
                    gradients[0][at] = slope @ w
                    gradients[1].add_(slope.T @ part)
        ctx.save_for_backward(*(gradients or ()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return x.mul_(gradient), weight.mul_(gradient), None, None, None

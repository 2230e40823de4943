"""Parts of the model that loops.c does faster than torch on a CPU; the rest of the code asks here.

Each equals, to rounding, what it stands for: `F.gelu` and `model.attention_weights` with dropout.
Their judges run wherever there is no compiler, on other devices and inside compiled graphs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptlite.core import loops
from gptlite.core.masks import NAMES, Mask, has_loop

MOST_THREADS = 2
"""Of torch's, up to which one thread of a loop is faster: 2 to 4 times as fast as one of them. A
compiler without OpenMP, as Apple's clang, makes loops of one thread (docs/benchmarks.md)."""
FEW_ROWS = 16
"""Up to here the weights are what takes time; above, torch's products are faster."""


def is_faster(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a loop for x that is faster than torch with its threads."""
    if torch.compiler.is_compiling() or not has_loop(x, dtype):
        return False
    return loops.has_threads() or torch.get_num_threads() <= MOST_THREADS


def fits(v: Tensor) -> bool:
    """Whether causal_attention takes values (B, H, S, D) now."""
    return v.shape[2] <= loops.LONGEST_ROW and is_faster(v, v.dtype)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's approximation of the Gaussian error linear unit (arXiv:1606.08415)."""
    if not is_faster(x, x.dtype):
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled():
        y: Tensor = _GELU.apply(x)
        return y
    return gelu_and_slope(x)[0]


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, slope = torch.empty_like(x), torch.empty_like(x)
    run = loops.function(f"gelu_{NAMES[x.dtype]}")
    run(x.data_ptr(), y.data_ptr(), slope.data_ptr(), x.numel())
    return y, slope


class _GELU(torch.autograd.Function):
    """Keeps the slope instead of x: going back is one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, slope = gelu_and_slope(x)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """(B, H, T, D), (B, H, S, D) twice → (B, H, T, D): what the last T of S tokens read.

    The causal mask, softmax and dropout of the weights are one pass; only the weights are kept.
    """
    z: Tensor = _CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v, mask)
    return z


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
        weights = q @ k.mT  # (BH, T, S), scores until `run`
        dropped = torch.empty_like(weights) if mask else None
        ctx.shape, ctx.mask = (B, H, T, D), mask
        run = loops.function(f"softmax_{NAMES[weights.dtype]}")
        run(*layout(ctx, weights), weights.data_ptr(), address(dropped))
        ctx.save_for_backward(q, k, v, weights)
        return ((weights if dropped is None else dropped) @ v).view(B, H, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.reshape(*q.shape[:2], -1)
        scores = gradient @ v.mT  # (BH, T, S), of the dropped weights until `run`
        dropped = torch.empty_like(weights) if ctx.mask else None
        run = loops.function(f"softmax_back_{NAMES[weights.dtype]}")
        args = (weights.data_ptr(), scores.data_ptr(), address(dropped))
        run(*layout(ctx, weights), *args)
        read = weights if dropped is None else dropped
        gradients = (scores @ k, scores.mT @ q, read.mT @ gradient)
        return (*(x.view(*ctx.shape[:2], *x.shape[1:]) for x in gradients), None)


def layout(ctx: Any, weights: Tensor) -> tuple[loops.Rows, float]:
    """Of weights (BH, T, S), and what scores are multiplied by."""
    B, H, T, D = ctx.shape
    if ctx.mask:
        return ctx.mask.layout(weights.view(B, H, T, -1)), D**-0.5
    return loops.Rows(B=B, H=H, T=T, W=weights.shape[-1]), D**-0.5


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Linear(nn.Linear):
    """torch's, except that a few rows at a time, as in generation, go at the pace of the memory.

    Weights may be bfloat16 while all else is float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.few(x):
            return few_rows(x.contiguous(), self.weight, self.bias)
        if x.dtype == torch.float32 and self.weight.dtype == torch.bfloat16:
            y = F.linear(x.bfloat16(), self.weight).float()
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)

    def few(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features:
            return False
        known = x.dtype == torch.float32 and is_faster(self.weight, x.dtype)
        return known and not torch.is_autocast_enabled("cpu")


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K) → (..., N); a row does not depend on the others."""
    assert weight.is_contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    run = loops.function(f"linear_{NAMES[weight.dtype]}")
    sizes = x.numel() // x.shape[-1], x.shape[-1], len(weight)
    run(weight.data_ptr(), x.data_ptr(), address(bias), y.data_ptr(), *sizes)
    return y


def can_read_cache(q: Tensor, v: Tensor) -> bool:
    """Whether `read_cache` takes queries (B, H, T, D) now: those of one new token."""
    one = q.shape[2] == 1 and q.dtype == v.dtype == torch.float32
    return one and not torch.is_grad_enabled() and fits(v)


def read_cache(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """(B, H, 1, D) read (B, G, S, D) of a cache → (B, H, 1, D); row b those up to `at` (B,)."""
    (B, H, _, D), G = q.shape, k.shape[1]
    if k.stride() != v.stride() or k.stride()[2:] != (D, 1):
        k, v = k.contiguous(), v.contiguous()
    z = torch.empty(B, H, 1, D)
    tensors = (q.contiguous(), k, v, at.contiguous(), z)
    loops.function("read_one")(*map(address, tensors), k.stride(0), k.stride(1), B, H, G, D)
    return z

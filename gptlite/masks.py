"""Keyed masks: which values fall is a pure function of names and numbers, of no generator's state.

    row key  = key of (seed, step, sample, position) + salt of (site, layer, head)
    word i   = mix(row key + i * GAMMA), the splitmix64 sequence (Steele, Lea, Flood 2014)
    draw c   = 16 bits, quarter c mod 4 of word c // 4; of its 2**16 values, `cut` drop

One word decides four values, and the backward pass draws masks again instead of keeping them. Of
the generators timed by `scripts/bench_dropout.py` splitmix64 is the fastest with 64 bits of key per
row, and it passes BigCrush; `tests/test_masks.py` tests its use here. `plain` says what comes out.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gptlite import loops
from gptlite.dropout_config import RATES
from gptlite.keys import key, numbered

TILE_WORDS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Words drawn at a time by `tiled`: on a CPU what its caches hold."""


def signed(number: int) -> int:
    """The 64 bits of an unsigned number as torch's int64 holds them."""
    return number - (1 << 64) if number >= 1 << 63 else number


GAMMA, FIRST, SECOND = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """Scramble 64 bits (splitmix64's finaliser); int64 wraps alike on every device."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def sample_keys(seed: int, step: int, rows: NDArray[np.int64]) -> Tensor:
    """One key for each of these rows of the update's global batch, (B,)."""
    return torch.from_numpy(numbered(key(seed, "dropout", step), rows).view(np.int64))


class MaskKeys(NamedTuple):
    """Which sample, and which token of it, a place in the batch is."""

    sample: Tensor
    """(B, 1)."""
    token: Tensor
    """(B, T), of sample and position."""
    position: Tensor | None
    """(B, T) counted from the first real token, where there is padding."""
    real: Tensor | None
    """(B, T) False at padding."""


def mask_keys(samples: Tensor, position: Tensor, real: Tensor | None) -> MaskKeys:
    """`samples` (B,) of `sample_keys`, `position` (B or 1, T)."""
    sample = samples[:, None]
    token = mix(sample + (position + 1) * GAMMA)
    return MaskKeys(sample, token, None if real is None else position, real)


class Mask(NamedTuple):
    """What decides the mask of a tensor (B, T, W) or (B, H, T, W)."""

    keys: Tensor
    """(B, T), or (B, 1) if all positions share a mask."""
    salts: Tensor
    """(H,), or (1,)."""
    cut: int | Tensor
    """Of the 2**16 values of a draw, how many drop; a tensor where a graph is compiled."""

    def rows(self, x: Tensor) -> Tensor:
        """The key of each row of x."""
        rows = self.keys[:, None] + self.salts[:, None] if x.ndim == 4 else self.keys + self.salts
        return rows.expand(x.shape[:-1])

    def layout(self, x: Tensor) -> loops.Rows:
        """The same for loops.c; it holds addresses, not the keys themselves."""
        B, *H, T, W = x.shape
        shared = self.keys.shape[1] == 1
        assert self.keys.shape == (B, 1 if shared else T)
        assert len(self.salts) == (H[0] if H else 1)
        strides = (self.keys.stride(0), 0 if shared else self.keys.stride(1))
        return loops.Rows(
            *(self.keys.data_ptr(), self.salts.data_ptr(), *strides),
            *(B, len(self.salts), T, W),
            *(self.cut - (RATES >> 1), RATES / (RATES - self.cut)),
        )


def cut_of(rate: float) -> int:
    """Of the 2**16 values of a draw, how many drop."""
    return round(rate * RATES)


def drop(x: Tensor, mask: Mask, dtype: torch.dtype | None = None) -> Tensor:
    """Zero each value with probability cut / RATES and scale the others by the exact reciprocal.

    The product is made in float32 and rounded once, to `dtype` (that of x unless given).
    """
    dtype = dtype or x.dtype
    if isinstance(mask.cut, Tensor):  # a checkpoint has the mask drawn again in the backward pass
        fused: Tensor = checkpoint(
            plain, x, mask, dtype, use_reentrant=False, preserve_rng_state=False
        )
        return fused
    dropped: Tensor = _Drop.apply(x, mask, dtype) if mask.cut else x
    return dropped


class _Drop(torch.autograd.Function):
    """The product of x and its mask; the gradient is the product of the gradient and that mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
        ctx.mask, ctx.dtype = mask, x.dtype
        if built(x, dtype):
            return compiled(x, mask, dtype)
        y, kept = tiled(x, mask, dtype)
        ctx.save_for_backward(kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors  # once, as a checkpoint makes them at the first look
        if not saved:
            return compiled(gradient, ctx.mask, ctx.dtype), None, None
        scaled = (gradient * saved[0]).mul_(RATES / (RATES - ctx.mask.cut))
        return scaled.to(ctx.dtype), None, None


def plain(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """The formula, one word per value: what a compiler fuses, and what judges the fast paths."""
    feature, cut = torch.arange(x.shape[-1], device=x.device), mask.cut
    words = mix(mask.rows(x)[..., None] + (feature >> 2) * GAMMA)
    draws = words >> (feature & 3) * 16 & RATES - 1
    kept = (draws ^ RATES >> 1) >= cut  # the order of signed 16 bits, as the fast paths compare
    wide = torch.promote_types(x.dtype, torch.float32)  # 1 / 0.9 is 0.2 % off in bfloat16
    scale = torch.as_tensor(RATES / (RATES - cut), dtype=wide)
    return (x.to(wide) * torch.where(kept, scale, 0.0)).to(dtype)


def tiled(x: Tensor, mask: Mask, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product, and 1 where a value is kept. Needs no compiler.

    A few words per operation, in place, so that they stay in the cache.
    """
    x, width, cut = x.contiguous(), x.shape[-1], mask.cut
    y, n_words = torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype)), -(-width // 4)
    n = max(1, TILE_WORDS.get(x.device.type, 1 << 17) // n_words)
    steps, rows = torch.arange(n_words, device=x.device) * GAMMA, mask.rows(x).reshape(-1, 1)
    words = torch.empty(min(n, len(rows)), n_words, dtype=torch.int64, device=x.device)
    spare, kept = torch.empty_like(words), y.new_empty(*x.shape[:-1], 4 * n_words)
    views = (part.view(-1, part.shape[-1]).split(n) for part in (x, y, kept))
    for keys, from_, to, k in zip(rows.split(n), *views, strict=True):
        w, s = words[: len(k)], spare[: len(k)]
        torch.add(keys, steps, out=w)
        for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
            torch.bitwise_right_shift(w, shift, out=s)
            w ^= s.bitwise_and_((1 << 64 - shift) - 1)
            if factor is not None:
                w *= factor
        torch.ge(w.view(torch.int16), cut - (RATES >> 1), out=k)
        torch.mul(from_, k[:, :width], out=to)
        to *= RATES / (RATES - cut)
    return y.to(dtype), kept[..., :width]


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Types of values that loops.c knows."""


def built(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a loop from x to this type."""
    known = x.is_cpu and x.dtype in NAMES and dtype in NAMES
    return known and loops.library() is not None


def compiled(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """The product by loops.c."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    run = loops.function(f"drop_{NAMES[x.dtype]}_to_{NAMES[dtype]}")
    run(mask.layout(x), x.data_ptr(), y.data_ptr())
    return y

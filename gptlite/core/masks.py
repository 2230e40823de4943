"""Keyed masks: which values fall is a pure function of names and numbers, of no generator's state.

    row key  = mix(key of (seed, step, sample, position) + salt of (site, layer, head)), 64 bits
    word i   = scramble(low half of the row key + i * STEP, high half), 32 bits
    draw c   = 16 bits: of 32 values, the low halves of 16 words decide the first 16, their high
               halves the others; of its 2**16 values, `cut` drop

One word decides two values, and the backward pass draws masks again instead of keeping them. `mix`
is splitmix64's finaliser (Steele, Lea, Flood 2014), `scramble` lowbias32 (Wellons, hash-prospector)
with the high half added behind its first product: what every CPU multiplies fast is 32 bits wide.
`tests/core/test_masks.py` tests their use here. `mask_by_formula` says what comes out.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gptlite.config.dropout import RATES
from gptlite.core import loops
from gptlite.keys import derive_keys, key

TILE_WORDS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Words drawn at a time by `mask_in_tiles`: on a CPU what its caches hold."""


def to_int64(number: int) -> int:
    """The 64 bits of an unsigned number as torch's int64 holds them."""
    return number - (1 << 64) if number >= 1 << 63 else number


GAMMA, FIRST, SECOND = map(to_int64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
STEP, ONE, TWO = (low - (1 << 32) * (low >> 31) for low in (0x9E3779B9, 0x21F0AAAD, 0xD35A2D97))
BLOCK, HALF_BLOCK = 32, 16
"""Values that a block of words decides, and the words in it."""


def mix(x: Tensor) -> Tensor:
    """Scramble 64 bits (splitmix64's finaliser); int64 wraps alike on every device."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def low_half(x: Tensor) -> Tensor:
    """The low 32 bits of 64 as int32."""
    return (x << 32 >> 32).to(torch.int32)


def scramble(x: Tensor, high: Tensor) -> Tensor:
    """Scramble 32 bits, differently for each `high`; int32 wraps alike on every device."""
    x = (x ^ (x >> 16 & 0xFFFF)) * ONE + high
    x = (x ^ (x >> 15 & 0x1FFFF)) * TWO
    return x ^ (x >> 15 & 0x1FFFF)


def sample_keys(seed: int, step: int, rows: NDArray[np.int64]) -> Tensor:
    """One key for each of these rows of the update's global batch, (B,)."""
    return torch.from_numpy(derive_keys(key(seed, "dropout", step), rows).view(np.int64))


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
        return mix(rows).expand(x.shape[:-1])

    def layout(self, x: Tensor) -> loops.Rows:
        """The same for loops.c; it holds addresses, not the keys themselves."""
        B, *H, T, W = x.shape
        shared = self.keys.shape[1] == 1
        assert self.keys.shape == (B, 1 if shared else T)
        assert len(self.salts) == (H[0] if H else 1)
        strides = (self.keys.stride(0), 0 if shared else self.keys.stride(1))
        return loops.Rows(
            self.keys.data_ptr(),
            self.salts.data_ptr(),
            *strides,
            B,
            len(self.salts),
            T,
            W,
            threshold(self.cut),
            RATES / (RATES - self.cut),
        )


def cut_of(rate: float) -> int:
    """Of the 2**16 values of a draw, how many drop."""
    return round(rate * RATES)


def threshold(cut: Any) -> Any:
    """Draws are compared as signed 16 bits, in the upper half of a word: below this they drop."""
    return (cut - (RATES >> 1)) << 16


def drop(x: Tensor, mask: Mask, dtype: torch.dtype | None = None) -> Tensor:
    """Zero each value with probability cut / RATES and scale the others by the exact reciprocal.

    The product is made in float32 and rounded once, to `dtype` (that of x unless given).
    """
    dtype = dtype or x.dtype
    if isinstance(mask.cut, Tensor):  # a checkpoint has the mask drawn again in the backward pass
        fused: Tensor = checkpoint(
            mask_by_formula, x, mask, dtype, use_reentrant=False, preserve_rng_state=False
        )
        return fused
    dropped: Tensor = _Drop.apply(x, mask, dtype) if mask.cut else x
    return dropped


class _Drop(torch.autograd.Function):
    """The product of x and its mask; the gradient is the product of the gradient and that mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
        ctx.mask, ctx.dtype = mask, x.dtype
        if has_loop(x, dtype):
            return mask_by_loop(x, mask, dtype)
        y, kept = mask_in_tiles(x, mask, dtype)
        ctx.save_for_backward(kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors  # once, as a checkpoint makes them at the first look
        if not saved:
            return mask_by_loop(gradient, ctx.mask, ctx.dtype), None, None
        scaled = (gradient * saved[0]).mul_(RATES / (RATES - ctx.mask.cut))
        return scaled.to(ctx.dtype), None, None


def mask_by_formula(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """The formula, one word per value: what a compiler fuses, and what judges the fast paths."""
    feature, cut = torch.arange(x.shape[-1], device=x.device), mask.cut
    rows = mask.rows(x)[..., None]
    number = (feature // BLOCK * HALF_BLOCK + feature % HALF_BLOCK).to(torch.int32)
    words = scramble(low_half(rows) + number * STEP, low_half(rows >> 32))
    draws = torch.where(feature % BLOCK < HALF_BLOCK, words << 16, words)
    kept = draws >= threshold(cut)
    wide = torch.promote_types(x.dtype, torch.float32)  # 1 / 0.9 is 0.2 % off in bfloat16
    scale = torch.as_tensor(RATES / (RATES - cut), dtype=wide)
    return (x.to(wide) * torch.where(kept, scale, 0.0)).to(dtype)


def mask_in_tiles(x: Tensor, mask: Mask, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product, and 1 where a value is kept. Needs no compiler.

    A few words per operation, in place, so that they stay in the cache.
    """
    x, width, cut = x.contiguous(), x.shape[-1], mask.cut
    y, blocks = torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype)), -(-width // BLOCK)
    n = max(1, TILE_WORDS.get(x.device.type, 1 << 17) // (blocks * HALF_BLOCK))
    number = torch.arange(blocks * HALF_BLOCK, dtype=torch.int32, device=x.device) * STEP
    rows = mask.rows(x).reshape(-1, 1)
    low, high = low_half(rows), low_half(rows >> 32)
    words = torch.empty(min(n, len(rows)), len(number), dtype=torch.int32, device=x.device)
    spare, kept = torch.empty_like(words), y.new_empty(*x.shape[:-1], blocks * BLOCK)
    views = (part.view(-1, part.shape[-1]).split(n) for part in (x, y, kept))
    for lower, upper, from_, to, k in zip(low.split(n), high.split(n), *views, strict=True):
        w, s = words[: len(k)], spare[: len(k)]
        torch.add(lower, number, out=w)
        for shift, factor, more in ((16, ONE, upper), (15, TWO, 0), (15, 1, 0)):
            torch.bitwise_right_shift(w, shift, out=s)
            w ^= s.bitwise_and_((1 << 32 - shift) - 1)
            if factor != 1:
                w.mul_(factor).add_(more)
        halves = k.view(len(k), blocks, 2, HALF_BLOCK)
        torch.ge(w.view(len(k), blocks, HALF_BLOCK), threshold(cut), out=halves[:, :, 1])
        torch.ge(w.view(len(k), blocks, HALF_BLOCK) << 16, threshold(cut), out=halves[:, :, 0])
        torch.mul(from_, k[:, :width], out=to)
        to *= RATES / (RATES - cut)
    return y.to(dtype), kept[..., :width]


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Types of values that loops.c knows."""


def has_loop(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a loop from x to this type."""
    known = x.is_cpu and x.dtype in NAMES and dtype in NAMES
    return known and loops.library() is not None


def mask_by_loop(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """The product by loops.c."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    run = loops.function(f"drop_{NAMES[x.dtype]}_to_{NAMES[dtype]}")
    run(mask.layout(x), x.data_ptr(), y.data_ptr())
    return y

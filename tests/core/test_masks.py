"""Masks: the fast paths equal the formula, rates are exact, and nothing in them is related."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gptlite.config.dropout import RATES, SitePlan
from gptlite.core import loops, masks
from gptlite.core.dropout import Dropout
from gptlite.core.masks import Mask, mask_by_formula, mask_keys, mix, sample_keys

needs_compiler = pytest.mark.skipif(loops.library() is None, reason="no C compiler here")
PATHS = {
    "loop": pytest.param(masks.mask_by_loop, marks=needs_compiler),
    "tiled": lambda x, mask, dtype: masks.mask_in_tiles(x, mask, dtype)[0],
}
SHAPES = [
    (3, 5, 7),
    (2, 4, 64),
    (13, 103, 1030),
    (5, 1, 1),
    (3, 2, 257),
    (3, 4, 5, 9),
    (2, 3, 1, 1),
]
DTYPES = (torch.float32, torch.bfloat16)


def some_mask(shape: tuple[int, ...], cut: int, *, shared: bool = False) -> Mask:
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randint(-(2**62), 2**62, size, generator=generator)

    heads = shape[1] if len(shape) == 4 else 1
    return Mask(numbers(shape[0], 1 if shared else shape[-2]), numbers(heads), cut)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("path", [*PATHS.values()], ids=[*PATHS])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("from_", "to"), [*itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fast_paths_equal_the_formula_bit_for_bit(
    shape: tuple[int, ...],
    from_: torch.dtype,
    to: torch.dtype,
    shared: bool,
    path: Callable[..., Tensor],
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(from_)
    for cut in (1, 66, 6554, 32768, 58982, 65535):
        mask = some_mask(shape, cut, shared=shared)
        assert torch.equal(bits(path(x, mask, to)), bits(mask_by_formula(x, mask, to)))


@pytest.mark.parametrize("path", [*PATHS.values()], ids=[*PATHS])
def test_what_is_not_finite_or_not_contiguous_comes_out_as_the_formula_says(
    path: Callable[..., Tensor],
) -> None:
    """A loss that is not finite must be seen; a dropped infinity is not a number, as in torch."""
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 3e38, 1e-45, 1.0, -1.0]).repeat(2, 4, 3)
    mask = some_mask((2, 4, 24), 32768)
    for dtype in DTYPES:
        torch.testing.assert_close(
            path(x, mask, dtype), mask_by_formula(x, mask, dtype), rtol=0, atol=0, equal_nan=True
        )
    turned = torch.randn(2, 24, 4).transpose(1, 2)
    assert torch.equal(
        path(turned, mask, torch.float32), mask_by_formula(turned, mask, torch.float32)
    )


def test_words_are_the_published_sequence() -> None:
    """splitmix64 from seed 0, as in Vigna's splitmix64.c and java.util.SplittableRandom."""
    words = mix(torch.arange(1, 4) * masks.GAMMA).tolist()
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert words == [masks.to_int64(word) for word in known]


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_rates_and_scale_are_exact(rate: float) -> None:
    """1.05e7 draws within 4 standard errors; the kept values are the float32 reciprocal."""
    cut = masks.cut_of(rate)
    assert abs(cut / RATES - rate) <= 0.5 / RATES
    y = masks.drop(torch.ones(40, 256, 1024), some_mask((40, 256, 1024), cut))
    dropped, n, p = int((y == 0).sum()), y.numel(), cut / RATES
    assert abs(dropped - n * p) < 4 * math.sqrt(n * p * (1 - p))
    assert y[y != 0].unique().tolist() == [torch.tensor(RATES / (RATES - cut)).item()]


def test_one_of_65536_draws_drops_at_the_smallest_rate() -> None:
    y = masks.drop(torch.ones(40, 256, 1024), some_mask((40, 256, 1024), 1))
    expected = y.numel() / RATES
    assert abs(int((y == 0).sum()) - expected) < 4 * math.sqrt(expected)


B, T, W = 8, 64, 512


def kept(
    rate: float = 0.5,
    *,
    site: str = "mlp_output",
    layer: int = 0,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Where a site keeps, (B, T, W) or (B, H, T, W)."""
    module = Dropout(site, SitePlan(rate), layer, 4, n_head=4).train()
    shape = (B, 4, T, W // 4) if site == "attention_weights" else (B, T, W)
    keys = mask_keys(sample_keys(seed, step, np.arange(B)), torch.arange(T)[None], None)
    return module(torch.ones(shape), keys) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard error under independence, 1 / sqrt(n)."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    return float((a * b).mean() / (a.std() * b.std())) * math.sqrt(a.numel())


RATES_TO_RELATE = (0.1, 0.5, 0.9)


@pytest.mark.parametrize("rate", RATES_TO_RELATE)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 255])
def test_features_are_independent(rate: float, lag: int) -> None:
    """Between words, between both halves of a word (16 apart), and far apart."""
    mask = kept(rate)
    assert abs(correlation(mask[..., :-lag], mask[..., lag:])) < 4


@pytest.mark.parametrize("rate", RATES_TO_RELATE)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32])
def test_positions_and_samples_are_independent(rate: float, lag: int) -> None:
    mask = kept(rate)
    assert abs(correlation(mask[:, :-lag], mask[:, lag:])) < 4
    if lag < 5:
        assert abs(correlation(mask[:-lag], mask[lag:])) < 4


@pytest.mark.parametrize("rate", RATES_TO_RELATE)
def test_heads_are_independent(rate: float) -> None:
    mask = kept(rate, site="attention_weights")
    for a, b in itertools.combinations(range(4), 2):
        assert abs(correlation(mask[:, a], mask[:, b])) < 4


@pytest.mark.parametrize("rate", RATES_TO_RELATE)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", (0, 1, 2)),
        ("step", (0, 1, 2, 1000)),
        ("layer", (0, 1, 3)),
        ("site", ("mlp_output", "attention_output", "embedding", "final")),
    ],
)
def test_names_give_independent_masks(rate: float, name: str, values: tuple[object, ...]) -> None:
    made = [kept(rate, **{name: value}) for value in values]  # type: ignore[arg-type]
    for a, b in itertools.combinations(made, 2):
        assert abs(correlation(a, b)) < 4


@pytest.mark.parametrize("rate", RATES_TO_RELATE)
def test_rows_and_columns_vary_as_chance_does(rate: float) -> None:
    """Chi-square over the counts of rows, of columns and of samples, and the number of runs."""
    mask = kept(rate).double()
    p, n = 1 - masks.cut_of(rate) / RATES, mask.numel()
    for dims in ((2,), (0, 1), (1, 2), (0,)):
        counts, each = mask.sum(dims), n / mask.sum(dims).numel()
        chi_square = float(((counts - each * p) ** 2 / (each * p * (1 - p))).sum())
        free = counts.numel()
        assert abs(chi_square - free) < 4 * math.sqrt(2 * free)
    changes = mask[..., 1:] != mask[..., :-1]
    chance, both = 2 * p * (1 - p), p * (1 - p)  # of a change, and of two in a row
    variance = changes.numel() * (chance * (1 - chance) + 2 * (both - chance**2))
    assert abs(int(changes.sum()) - changes.numel() * chance) < 4 * math.sqrt(variance)


def some_words() -> Tensor:
    """(B, T, 4096)."""
    rows = mix(mask_keys(sample_keys(3, 5, np.arange(B)), torch.arange(T)[None], None).token)
    low, upper = (masks.low_half(half)[..., None] for half in (rows, rows >> 32))
    number = torch.arange(4096, dtype=torch.int32) * masks.STEP
    return masks.scramble(low + number, upper)


@pytest.mark.parametrize("half", range(2))
def test_both_halves_of_a_word_are_uniform(half: int) -> None:
    """Chi-square over both bytes of a draw; its lowest bits decide at small rates."""
    draws = some_words() >> 16 * half & 0xFFFF
    for part in (draws & 0xFF, draws >> 8):
        counts = part.flatten().bincount(minlength=256).double()
        each = counts.mean()
        chi_square = float(((counts - each) ** 2 / each).sum())
        assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


def test_every_bit_of_a_word_is_fair_and_related_to_no_other() -> None:
    """Each of 32 bits, each pair of them, and each with the next word's: 2.1 M words."""
    words = some_words()
    bits = torch.stack([words >> i & 1 for i in range(32)]).flatten(1).float() * 2 - 1
    n = bits.shape[1]
    assert (bits.mean(1).abs() * math.sqrt(n)).max() < 4.5
    for other in (bits, bits.roll(1, 1)):
        pairs = bits @ other.T / math.sqrt(n)
        if other is bits:
            pairs.fill_diagonal_(0)
        assert pairs.abs().max() < 5


def test_rows_whose_words_start_alike_are_told_apart() -> None:
    """The low half of a row's key says where its words begin, the high half which sequence."""
    count = torch.arange(1 << 16, dtype=torch.int32) * masks.STEP
    keys = mix(torch.arange(20))
    rows = [masks.scramble(count, high) for high in masks.low_half(keys >> 32)]
    for a, b in itertools.pairwise(rows):
        for half in range(2):
            one, other = ((x >> 16 * half & 0xFFFF) < 6554 for x in (a, b))
            assert abs(correlation(one, other)) < 4.5


def test_masks_have_the_distribution_of_torchs_dropout() -> None:
    """The oracle: counts per row of ours and of torch.nn.Dropout are two samples of one law."""
    ours = kept(0.2)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = torch.nn.Dropout(0.2)(torch.ones(B, T, W)) != 0
    torch.set_rng_state(generator_state)
    counts = [mask.sum(-1).double().flatten() for mask in (ours, theirs)]
    edges = torch.tensor([-math.inf, 395, 402, 407, 412, 417, 422, math.inf], dtype=torch.float64)
    table = torch.stack([torch.histogram(c, edges.clamp(-1, 600)).hist for c in counts])
    expected = table.sum(0) / 2
    chi_square = float(((table - expected) ** 2 / expected).sum())
    free = table.shape[1] - 1
    assert abs(chi_square - free) < 4 * math.sqrt(2 * free)


@pytest.mark.parametrize("built", [pytest.param(True, marks=needs_compiler), False])
def test_the_gradient_has_the_mask_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    monkeypatch.setattr(masks, "has_loop", lambda x, dtype: built)
    x = torch.randn(3, 7, 30).requires_grad_()
    mask = some_mask((3, 7, 30), 19661)
    for dtype in DTYPES:
        y = masks.drop(x, mask, dtype)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(gradient == 0, y == 0)
        expected = mask_by_formula(torch.ones(3, 7, 30), mask, torch.float32)
        assert torch.equal(gradient, expected)


def test_without_a_compiler_there_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    loops.building.cache_clear()
    loops.library.cache_clear()
    try:
        assert loops.library() is None
        x, mask = torch.ones(2, 3, 8), some_mask((2, 3, 8), 32768)
        assert torch.equal(masks.drop(x, mask), mask_by_formula(x, mask, torch.float32))
    finally:
        loops.building.cache_clear()
        loops.library.cache_clear()

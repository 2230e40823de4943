"""The compiled loops of the model equal what they stand for to rounding, their masks to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.config.dropout import DropoutConfig
from gptlite.config.run import ModelConfig
from gptlite.core import kernels, loops, masks
from gptlite.core.decode import DecodingCache
from gptlite.core.kernels import causal_attention, gelu
from gptlite.core.masks import Mask, sample_keys
from gptlite.core.model import GPT, attention_weights
from tests.conftest import only

needs_compiler = pytest.mark.skipif(loops.library() is None, reason="no C compiler here")
pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [
    (2, 3, 50, 50, 8),
    (1, 1, 1, 1, 4),
    (2, 2, 64, 64, 16),
    (1, 2, 5, 130, 8),
    (2, 1, 1, 67, 8),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(run, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = run(*inputs)
    return [y, *torch.autograd.grad(y, inputs, numbers(*y.shape, seed=9).to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 40_000])
def test_gelu_is_torchs(dtype: torch.dtype, n: int) -> None:
    """In bfloat16 the slope is rounded once more: half a unit in the last of 8 bits."""
    x = (4 * numbers(n)).to(dtype)
    ours = with_gradients(gelu, x)
    theirs = with_gradients(lambda x: F.gelu(x.float(), approximate="tanh"), x)
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2**-7}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)


def test_gelu_at_the_edges() -> None:
    far = torch.tensor([-torch.inf, -1e6, -90.0, -20.0, 0.0, 20.0, 90.0, 1e30])
    y = gelu(far[1:])
    assert torch.equal(y[-3:], far[-3:])
    assert y[3] == 0
    assert (y[:3].abs() < 1e-30).all()
    assert gelu(torch.tensor([torch.nan])).isnan().all()


def some_mask(B: int, H: int, T: int, cut: int) -> Mask | None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**62), 2**62, (B, T), generator=generator)
    return Mask(keys, torch.arange(H) * 12345, cut) if cut else None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    weights = attention_weights(q, k, None)
    return (weights if mask is None else masks.drop(weights, mask)) @ v


@pytest.mark.parametrize("cut", [0, 13107, 65000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_attention_is_the_plain_one(
    shape: tuple[int, ...], dtype: torch.dtype, cut: int
) -> None:
    B, H, T, S, D = shape
    q, k, v = (numbers(B, H, n, D, seed=i) for i, n in enumerate((T, S, S)))
    mask = some_mask(B, H, T, cut)
    ours = with_gradients(lambda *x: causal_attention(*x, mask), *(x.to(dtype) for x in (q, k, v)))
    theirs = with_gradients(lambda *x: plain(*x, mask), *(x.to(dtype).float() for x in (q, k, v)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        size = float(b.detach().abs().max())
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance * max(1.0, size))


@pytest.mark.parametrize("T", [1, 7, 64, 200])
def test_the_weights_that_drop_are_those_of_the_formula(T: int) -> None:
    """Values are unit vectors, so what is read is the dropped weights themselves."""
    q, k = numbers(2, 3, T, 8), numbers(2, 3, T, 8, seed=1)
    mask = some_mask(2, 3, T, 20000)
    assert mask is not None
    read = causal_attention(q, k, torch.eye(T).expand(2, 3, T, T), mask)
    expected = masks.mask_by_formula(torch.ones(2, 3, T, T), mask, torch.float32).tril()
    assert torch.equal(read != 0, expected != 0)


def test_large_scores_and_rows_of_one_key_are_no_trouble() -> None:
    q = numbers(1, 1, 33, 4) * 1e4
    read, *gradients = with_gradients(lambda q: causal_attention(q, q, q, None), q)
    assert read.isfinite().all()
    assert gradients[0].isfinite().all()
    assert torch.equal(read[0, 0, 0], q[0, 0, 0])


def test_what_a_query_may_not_see_changes_nothing() -> None:
    q, k, v = (numbers(1, 2, 40, 8, seed=i) for i in range(3))
    before = causal_attention(q, k, v, None)
    k[..., 30:, :], v[..., 30:, :] = torch.inf, 1e30
    assert torch.equal(causal_attention(q, k, v, None)[..., :30, :], before[..., :30, :])


def test_a_row_too_long_is_left_to_torch() -> None:
    longest = torch.zeros(1, 1, loops.LONGEST_ROW, 1)
    assert kernels.fits(longest)
    assert not kernels.fits(torch.empty(1, 1, loops.LONGEST_ROW + 1, 1))
    assert not kernels.fits(longest.double())
    q = torch.zeros(1, 1, 2, 1)
    assert causal_attention(
        q, longest * 0, longest * 0 + 1, None
    ).flatten().tolist() == pytest.approx([1, 1])


MODELS = [
    {},
    {"position": "rope", "qk_norm": True},
    {"n_kv_head": 1, "norm": "rmsnorm", "mlp": "swiglu"},
    {"head_dim": 24, "intermediate_size": 88, "norm_eps": 1e-3, "rope_theta": 500.0},
    {"mlp": "relu2", "bias": False},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_a_model_with_fused_attention_is_the_plain_model(
    options: dict[str, object], half: bool
) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 20}
    config = ModelConfig.model_validate({**sizes, **options})
    dropout = only("attention_weights", "mlp_output", rate=0.3)
    ids = torch.randint(0, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for kernel in ("math", "fused"):
        model = GPT(config, 30, dropout, kernel=kernel, seed=1).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(ids, samples=sample_keys(0, 0, torch.arange(3).numpy()))
        logits.float().square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for plain, fused in zip(*results, strict=True):
        size = float(plain.detach().abs().max())
        assert (plain - fused).abs().max() <= (0.03 if half else 1e-5) * size


def test_native_masks_and_compiled_graphs_take_the_plain_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr("gptlite.core.model.causal_attention", refuse)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=4)
    native = only("attention_weights", masks="native")
    ids, samples = torch.zeros(2, 4, dtype=torch.long), sample_keys(0, 0, torch.arange(2).numpy())
    GPT(config, 5, native, kernel="fused").train()(ids, samples=samples)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    GPT(config, 5, DropoutConfig(preset="none"), kernel="fused")(ids)


@pytest.mark.parametrize("rows", [3, 400])
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    q = numbers(rows, 2, 16, 8)
    torch.set_num_threads(1)
    alone = causal_attention(q, q, q, some_mask(rows, 2, 16, 9999)), gelu(q)
    torch.set_num_threads(2)
    both = causal_attention(q, q, q, some_mask(rows, 2, 16, 9999)), gelu(q)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 5), (65, 48), (384, 131), (50, 256)])
def test_a_few_rows_are_multiplied_as_many_would_be(dtype: torch.dtype, N: int, K: int) -> None:
    """And a row comes out to the bit the same whatever else is in the batch."""
    layer = kernels.Linear(K, N)
    layer.weight.data = numbers(N, K).to(dtype)
    x = numbers(kernels.FEW_ROWS, K, seed=1)
    with torch.no_grad():
        alone = torch.cat([layer(row) for row in x.split(1)])
        for rows in (1, 2, 3, 7, 8, 9, 15, 16):
            y = layer(x[:rows])
            assert torch.equal(y, alone[:rows])
            expected = F.linear(x[:rows], layer.weight.float(), layer.bias)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_weights_in_half_serve_many_rows_too() -> None:
    layer, rows = kernels.Linear(8, 6), kernels.FEW_ROWS + 1
    x = numbers(2, rows, 8)
    expected = layer(x)
    layer.weight.data = layer.weight.data.bfloat16()
    y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    layer.bias = None
    with torch.no_grad():
        assert layer(x).dtype == layer(x[:1, :1]).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4), (2, 6, 2, 130, 16), (3, 4, 4, 65, 5)], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_one_token_reads_a_cache_as_the_plain_way_does(
    shape: tuple[int, ...], hidden: bool
) -> None:
    B, H, G, S, D = shape
    q, cache = numbers(B, H, 1, D), numbers(2, B, G, S + 9, D, seed=1)
    k, v = cache[0, :, :, :S], cache[1, :, :, :S]
    at = torch.full((B,), S - 1)
    if hidden:
        at = (S - 1 - 3 * torch.arange(B)).clamp(min=0)
        cache[1, :, :, S:] = torch.nan
    visible = torch.arange(S) <= at.view(B, 1, 1, 1)
    wide_k, wide_v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    weights = attention_weights(q, wide_k, visible)
    with torch.no_grad():
        assert kernels.can_read_cache(q, v)
        z = kernels.read_cache(q, k, v, at)
    torch.testing.assert_close(z, weights @ wide_v, rtol=1e-5, atol=1e-5)


def test_one_token_reads_values_that_lie_otherwise_than_the_keys() -> None:
    """Without a cache they are parts of one product: rope and norms move the keys only."""
    B, H, D = 3, 2, 8
    q, qkv = numbers(B, H, 1, D), numbers(B, 1, 3 * H, D, seed=1).transpose(1, 2)
    k, v = numbers(B, H, 1, D, seed=2), qkv[:, -H:]
    with torch.no_grad():
        torch.testing.assert_close(kernels.read_cache(q, k, v, torch.zeros(B, dtype=int)), v)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_generation_with_the_loops_is_generation_without(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 24}
    config = ModelConfig.model_validate({**sizes, **options})
    model, logits = GPT(config, 30, kernel="fused", seed=1).eval(), []
    ids = torch.randint(0, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    for library in (loops.library(), None):
        monkeypatch.setattr(loops, "library", lambda library=library: library)
        cache = DecodingCache(model, 3)
        with torch.no_grad():
            parts = [model(ids[:, :8], cache=cache)]
            parts += [model(ids[:, [at]], cache=cache) for at in range(8, 20)]
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)

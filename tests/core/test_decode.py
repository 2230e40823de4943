"""One new token through compiled blocks gives what the plain blocks give, whatever the model."""

import itertools

import pytest
import torch
from torch import Tensor

from gptlite.config.run import ModelConfig, SampleConfig
from gptlite.core import loops
from gptlite.core.decode import DecodingCache
from gptlite.core.generate import continuations, halve
from gptlite.core.model import GPT, KVCache
from gptlite.core.running_batch import copy_row

pytestmark = pytest.mark.skipif(loops.library() is None, reason="no C compiler here")
SIZES = {"n_layer": 2, "context_length": 24}
OPTIONS = [
    {"norm": norm, "mlp": mlp, "position": position, "qk_norm": qk_norm, "bias": bias, **heads}
    for (norm, mlp, position), (qk_norm, bias, heads) in itertools.product(
        [
            ("layernorm", "gelu", "learned"),
            ("rmsnorm", "swiglu", "rope"),
            ("layernorm", "relu2", "rope"),
        ],
        [
            (False, True, {"n_embd": 24, "n_head": 2}),
            (True, False, {"n_embd": 48, "n_head": 4, "n_kv_head": 2}),
            (False, False, {"n_embd": 36, "n_head": 6, "n_kv_head": 1}),
        ],
    )
]


def make_model(options: dict[str, object], *, kernel: str = "fused") -> GPT:
    model = GPT(ModelConfig.model_validate({**SIZES, **options}), 30, kernel=kernel, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide what is left out
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def decode_steps(
    model: GPT, rows: list[list[int]], *, plainly: bool = False
) -> tuple[Tensor, KVCache]:
    """Logits of five tokens behind these prompts, (5, B, 1, V)."""
    kind = KVCache if plainly else DecodingCache
    cache = kind(model, len(rows))
    for at, row in enumerate(rows):
        read = kind(model, 1)
        model(torch.tensor([row]), cache=read)
        cache.lengths[at] = len(row)
        copy_row(read, 0, cache, at)
    tokens = [torch.tensor([[step + row] for row in range(len(rows))]) for step in range(5)]
    return torch.stack([model(token, None, cache) for token in tokens]), cache


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_a_decoded_token_is_that_of_the_plain_blocks(
    options: dict[str, object], half: bool
) -> None:
    model = make_model(options)
    if half:
        halve(model)
    for rows in ([[1, 2, 3]], [[1, 2, 3], [4], [5, 6, 7, 8, 9]]):
        found, cache = decode_steps(model, rows)
        assert isinstance(cache, DecodingCache)
        assert cache.works
        expected, other = decode_steps(model, rows, plainly=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
            for row, end in enumerate(cache.lengths):
                close = {"rtol": 1e-4, "atol": 1e-4}
                torch.testing.assert_close(mine[row, :, :end], theirs[row, :, :end], **close)


def test_a_row_does_not_depend_on_its_company() -> None:
    model = make_model(OPTIONS[4])
    alone, _ = decode_steps(model, [[1, 2, 3]])
    together, _ = decode_steps(model, [[1, 2, 3], [4], [7, 8, 9, 5, 6]])
    assert torch.equal(alone[:, 0], together[:, 0])


@pytest.mark.parametrize(
    "why", ["kernel", "activation", "hook", "training", "gradients", "autocast"]
)
def test_what_block_c_does_not_know_goes_the_plain_way(why: str) -> None:
    model = make_model(
        OPTIONS[0] | ({"mlp": "gelu_exact"} if why == "activation" else {}),
        kernel="math" if why == "kernel" else "fused",
    )
    if why == "hook":
        model.blocks[-1].mlp.down.register_forward_hook(lambda *_: None)
    if why == "training":
        model.train()
    half = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with torch.set_grad_enabled(why == "gradients"), half:
        cache = DecodingCache(model, 1)
        model(torch.tensor([[1, 2]]), None, cache)
        model(torch.tensor([[3]]), None, cache)
    assert not cache.works


def test_generation_past_the_context_decodes_with_each_new_cache() -> None:
    options = SampleConfig.model_validate({"max_new_tokens": 60, "temperature": 0})
    models = make_model(OPTIONS[0]), make_model(OPTIONS[0], kernel="math")
    fast, plain = (list(continuations(m, [[1, 2], [3]], [0, 1], options)) for m in models)
    assert fast == plain

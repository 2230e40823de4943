"""The network: equal to Hugging Face's, equal with a cache, deaf to padding."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from conftest import EVERYWHERE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptlite.config.dropout import SITES, DropoutConfig
from gptlite.config.run import ModelConfig
from gptlite.core import loss
from gptlite.core.model import GPT, KVCache, angles, attention_weights, rotate

V = 61
OPTIONS = [
    {"position": position, "norm": norm, "mlp": mlp, "n_kv_head": n_kv_head, **more}
    for (position, norm, n_kv_head), (mlp, more) in itertools.product(
        itertools.product(("learned", "rope"), ("layernorm", "rmsnorm"), (4, 2, 1)),
        [
            ("gelu", {}),
            ("swiglu", {"bias": False, "qk_norm": True, "tie_embeddings": False}),
            ("relu2", {"qk_norm": True}),
        ],
    )
    if not (mlp == "relu2" and n_kv_head == 2)
]
OWN_SIZES = {"head_dim": 12, "intermediate_size": 40, "norm_eps": 1e-3, "rope_theta": 500.0}
OPTIONS += [
    {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, **OWN_SIZES},
    {"position": "learned", "norm": "layernorm", "mlp": "gelu", "n_kv_head": 4, **OWN_SIZES},
]


def config(**changes: object) -> ModelConfig:
    base = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24}
    return ModelConfig.model_validate({**base, **changes})


def loud(model: GPT) -> GPT:
    """Weights large enough that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def hugging_face_twin(model: GPT) -> torch.nn.Module:
    """A GPT2LMHeadModel with the weights of `model`; its Conv1D stores matrices transposed."""
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    c = model.config
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=c.context_length,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    names = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    ours, theirs = model.state_dict(), {}
    for name, tensor in ours.items():
        if not name.startswith("blocks."):
            continue
        _, layer, *middle, kind = name.split(".")
        inside = ".".join(middle)
        matrix = kind == "weight" and not inside.startswith("norm")
        theirs[f"transformer.h.{layer}.{names[inside]}.{kind}"] = tensor.T if matrix else tensor
    theirs["transformer.wte.weight"] = ours["token_embedding.weight"]
    theirs["transformer.wpe.weight"] = ours["position_embedding.weight"]
    theirs["transformer.ln_f.weight"] = ours["norm.weight"]
    theirs["transformer.ln_f.bias"] = ours["norm.bias"]
    left = twin.load_state_dict(theirs, strict=False)
    assert left.missing_keys == ["lm_head.weight"]
    assert not left.unexpected_keys
    return twin


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_logits_equal_hugging_face_gpt2(kernel: str) -> None:
    model = loud(GPT(config(), V, kernel=kernel))
    twin = hugging_face_twin(model)
    ids = torch.randint(V, (3, 24))
    with torch.no_grad():
        assert (model(ids) - twin(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_cached_logits_equal_uncached_ones(options: dict[str, object]) -> None:
    """A prompt at once, then one token at a time, for every position, norm and head grouping."""
    model = loud(GPT(config(**options), V, kernel="sdpa"))
    ids = torch.randint(V, (2, 20))
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model, 2)
        steps = [model(ids[:, :7], cache=cache)]
        steps += [model(ids[:, t : t + 1], cache=cache) for t in range(7, 20)]
    assert cache.lengths == [20, 20]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_fused_attention_equals_the_plain_one(options: dict[str, object]) -> None:
    plain, fused = (loud(GPT(config(**options), V, kernel=k)) for k in ("math", "sdpa"))
    fused.load_state_dict(plain.state_dict())
    ids = torch.randint(V, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(fused(ids), plain(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("left", "right"), [(0, 5), (5, 0), (3, 4), (11, 0)])
def test_padding_changes_no_real_logit(kernel: str, position: str, left: int, right: int) -> None:
    """Whatever the side and the amount, and whatever id the padding has."""
    model = loud(GPT(config(position=position), V, kernel=kernel))
    ids = torch.randint(V, (2, 12))
    pads = [torch.randint(V, (2, n)) for n in (left, right)]
    padded = torch.cat((pads[0], ids, pads[1]), 1)
    real = torch.zeros_like(padded, dtype=torch.bool)
    real[:, left : left + 12] = True
    with torch.no_grad():
        alone, inside = model(ids), model(padded, real)[:, left : left + 12]
    torch.testing.assert_close(inside, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_a_row_of_padding_alone_gives_no_nan(kernel: str) -> None:
    model = loud(GPT(config(), V, kernel=kernel))
    real = torch.tensor([[True] * 6, [False] * 6])
    logits = model(torch.zeros(2, 6, dtype=torch.long), real)
    assert logits.isfinite().all()
    logits[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_keys_weigh_exactly_nothing() -> None:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    real = torch.tensor([False, False, True, True, True])
    visible = (torch.ones(5, 5, dtype=torch.bool).tril() & real)[None, None]
    weights = attention_weights(q, k, visible)
    assert weights[..., :2].abs().max() == 0
    torch.testing.assert_close(weights[:, :, 2:].sum(-1), torch.ones(1, 2, 3))
    assert weights[:, :, :2].abs().max() == 0


def test_no_token_sees_the_future() -> None:
    model = loud(GPT(config(), V))
    ids = torch.randint(V, (1, 20))
    other = ids.clone()
    other[0, 10:] = (other[0, 10:] + 1) % V
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(i: int, j: int) -> Tensor:
        turned = [
            rotate(x, *angles(torch.tensor([[at]]), config(head_dim=16)))
            for x, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(3, 3), (q * k).sum(), rtol=1e-4, atol=1e-4)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_parameters_are_counted_without_building_them(options: dict[str, object]) -> None:
    c = config(**options)
    assert sum(p.numel() for p in GPT(c, V).parameters()) == c.n_parameters(V)


def test_gpt2_small_has_its_known_size() -> None:
    gpt2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024)
    assert gpt2.n_parameters(50257) == 124_439_808


def test_weights_are_named_by_seed_and_place() -> None:
    """Adding a layer or an option leaves the weights of the same name as they were."""
    small, same, other = (
        GPT(config(), V, seed=1),
        GPT(config(), V, seed=1),
        GPT(config(), V, seed=2),
    )
    deeper = GPT(config(n_layer=3, mlp="swiglu"), V, seed=1)
    name = "blocks.1.attention.qkv.weight"
    weight = small.state_dict()[name]
    assert torch.equal(weight, same.state_dict()[name])
    assert torch.equal(weight, deeper.state_dict()[name])
    assert not torch.equal(weight, other.state_dict()[name])


def test_weights_begin_like_gpt2s() -> None:
    model = GPT(config(n_embd=128, n_layer=4), V)
    state = model.state_dict()
    assert state["blocks.0.mlp.up.weight"].std() == pytest.approx(0.02, rel=0.05)
    residual = state["blocks.0.mlp.down.weight"].std()
    assert residual == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert state["blocks.0.mlp.up.bias"].abs().max() == 0
    assert model.head.weight is model.token_embedding.weight


def test_weights_can_begin_as_torch_makes_layers() -> None:
    model = GPT(config(n_embd=128, init="torch", tie_embeddings=False), V)
    state = model.state_dict()
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if not list(module.children()) and list(module.parameters()):
            twin = copy.deepcopy(module)
            twin.reset_parameters()
            for part, parameter in twin.named_parameters():
                ours, theirs = state[f"{name}.{part}"], parameter.detach()
                assert (ours.mean() - theirs.mean()).abs() < 0.05, name
                assert (ours.std() - theirs.std()).abs() <= 0.25 * theirs.std(), name
                assert ours.abs().max() <= 1.5 * theirs.abs().max(), name


def test_rates_reach_the_modules_of_their_sites() -> None:
    rates = {site: 0.05 * (i + 1) for i, site in enumerate(SITES)}
    model = GPT(config(), V, DropoutConfig.model_validate({"preset": "none", "sites": rates}))
    found = {m.site: m.p for m in model.modules() if hasattr(m, "site")}
    assert found == rates


def elsewhere(model: GPT) -> GPT:
    """The model on another device: `meta`, which every machine has."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return model


@pytest.mark.parametrize("parts", [False, True], ids=["all logits", "logits in parts"])
@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_nothing_is_made_on_another_device_than_the_model(
    monkeypatch: pytest.MonkeyPatch, position: str, kernel: str, parts: bool
) -> None:
    """A mask or a table left on the CPU would fail on a GPU only; fake tensors know where they are,
    and refuse to be mixed."""
    monkeypatch.setattr(loss, "PART_BYTES", 4 * V * (8 if parts else 10**6))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # `meta` has none
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    options = {"position": position, "n_kv_head": 2, "mlp": "swiglu", "qk_norm": True}
    model = elsewhere(GPT(config(**options), V, EVERYWHERE, kernel=kernel)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids, samples = (torch.zeros(n, dtype=torch.long, device="meta") for n in ((3, 24), (3,)))
        real = torch.ones(3, 24, dtype=torch.bool, device="meta")
        with pytest.raises(RuntimeError, match="same device"):
            model(ids, samples=samples.to("cpu"))
        for seen in (None, real):
            nats = model(ids, seen, samples=samples, targets=ids)
            nats.backward()
            assert nats.device == model(ids, seen, samples=samples).device == ids.device
        assert model.eval()(ids, cache=KVCache(model, 3)).device == ids.device

"""Every site acts in training and only then, as planned, and whatever happens around it.

Masks are compared by what fell: the zeros that a module's output has and its input had not.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from gptlite.config.dropout import PRESETS, RATES, SITES, DropoutConfig, DropoutSchedule, SitePlan
from gptlite.config.run import ModelConfig
from gptlite.core import model as network
from gptlite.core.dropout import (
    Dropout,
    check_every_rate_acts,
    dropouts,
    evaluating,
    live_sites,
    planned_sites,
    set_strength,
    strength_at,
)
from gptlite.core.masks import cut_of, mask_keys, sample_keys
from gptlite.core.model import GPT, Block, Scene
from gptlite.errors import ConfigError
from gptlite.planning import auto

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8)
IDS = torch.arange(16).view(2, 8)
LOCKED = {site: {"rate": 0.3, "granularity": "locked"} for site in SITES if SITES[site].by_feature}
LOCKED_EVERYWHERE = DropoutConfig.model_validate({"preset": "none", "sites": LOCKED})


def samples(n: int = 2, *, seed: int = 0, step: int = 0, first: int = 0) -> Tensor:
    return sample_keys(seed, step, np.arange(first, first + n))


def logits(model: GPT, step: int = 0, ids: Tensor = IDS) -> Tensor:
    torch.manual_seed(step)  # for native masks
    with torch.no_grad():
        return model(ids, samples=samples(len(ids), step=step))


def fallen(model: GPT, ids: Tensor, keys: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """What every module drops in one forward pass, by the module's name."""
    found: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[names[module]] = (output == 0) & (inputs[0] != 0)

    hooks = [module.register_forward_hook(look) for module in dropouts(model)]
    with torch.no_grad():
        model(ids, real, samples=keys)
    for hook in hooks:
        hook.remove()
    return found


def twin_of(model: GPT, dropout: DropoutConfig, **changes: Any) -> GPT:
    twin = GPT(model.config, model.vocab_size, dropout, **changes)
    twin.load_state_dict(model.state_dict())
    return twin.train()


@pytest.mark.parametrize("masks", ["keyed", "native"])
@pytest.mark.parametrize("site", SITES)
def test_every_site_acts_in_training_and_only_then(site: str, masks: str) -> None:
    """A rate in the config that reaches no module would be a silent no-op (nanoGPT's attn_dropout
    next to the fused kernel, nanoGPT PR 240)."""
    model = GPT(SMALL, 20, only(site, masks=masks))
    plain = GPT(SMALL, 20).eval()
    assert not torch.equal(logits(model.train(), 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(model, 0))
    assert torch.equal(logits(model.eval(), 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(plain, 0))


@pytest.mark.parametrize("site", SITES)
def test_no_two_sites_layers_or_positions_share_their_masks(site: str) -> None:
    model = GPT(SMALL, 20, EVERYWHERE).train()
    found = [m for m in dropouts(model) if m.site == site]
    others = [m for m in dropouts(model) if m.site != site]
    assert not {int(s) for m in found for s in m.salts} & {int(s) for m in others for s in m.salts}
    assert len({int(s) for m in found for s in m.salts}) == sum(len(m.salts) for m in found)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_is_exact_at_the_highest_rates(preset: str, kernel: str) -> None:
    """torch's fused attention drops in evaluation, too (pytorch 124464); ours must not."""
    rate = None if preset == "none" else 0.9
    model = GPT(SMALL, 20, DropoutConfig(preset=preset, rate=rate), kernel=kernel).train()
    with evaluating(model):
        assert torch.equal(logits(model, 0), logits(GPT(SMALL, 20, kernel=kernel).eval(), 1))


def test_rate_zero_is_bitwise_the_model_without_dropout() -> None:
    zero = DropoutConfig.model_validate({"preset": "none", "sites": dict.fromkeys(SITES, 0.0)})
    assert torch.equal(logits(GPT(SMALL, 20, zero).train()), logits(GPT(SMALL, 20).eval()))


def test_dropout_drops_again_after_an_evaluation() -> None:
    """Megatron-LM PR 411: after the first evaluation dropout stayed off."""
    model = GPT(SMALL, 20, only("mlp_output")).train()
    before = logits(model, 5)
    with evaluating(model):
        logits(model, 5)
    assert live_sites(model) == {"mlp_output": 2}
    assert torch.equal(logits(model, 5), before)


def test_every_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = GPT(SMALL, 20, only("embedding")).train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == modes


def test_dropout_can_be_left_on_to_see_what_that_costs() -> None:
    model = GPT(SMALL, 20, only("embedding")).eval()
    with evaluating(model, dropout_active=True):
        assert live_sites(model) == {"embedding": 1}
    assert live_sites(model) == {}


def test_a_rate_that_reaches_no_module_is_an_error() -> None:
    model, rates = GPT(SMALL, 20, only("embedding")), only("embedding").rates()
    check_every_rate_acts(model, rates)
    model.drop_embedding = nn.Identity()
    with pytest.raises(
        ConfigError, match=r"dropout\.sites\.embedding: rate 0\.5 reaches no module"
    ):
        check_every_rate_acts(model, rates)
    with pytest.raises(ConfigError, match="reaches no module"):
        check_every_rate_acts(GPT(SMALL, 20), only("mlp_output").rates())


def test_planned_sites_count_their_modules() -> None:
    planned = planned_sites(GPT(SMALL, 20, DropoutConfig(preset="gpt2")))
    per_layer = ("attention_weights", "attention_output", "mlp_output")
    assert planned == {"embedding": 1, **dict.fromkeys(per_layer, 2)}


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e-4, 0.3, 1.0])
def test_live_sites_are_the_planned_ones_at_any_strength(strength: float) -> None:
    """Rates that round to never, in some layers or in all, are no error while a rate rises."""
    dropout = only("mlp_output", "head", rate=0.1, profile=[0.4, 0.01])
    model = GPT(SMALL, 20, dropout).train()
    check_every_rate_acts(model, dropout.rates())
    set_strength(model, strength)
    assert live_sites(model) == planned_sites(model, strength)


def test_tools_that_look_for_torchs_dropout_find_ours() -> None:
    model = GPT(SMALL, 20, EVERYWHERE).train()
    found = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found == dropouts(model)
    for module in found:
        module.p = 0.0
    assert live_sites(model) == {}
    assert torch.equal(logits(model), logits(GPT(SMALL, 20).eval()))


def test_training_without_keys_is_refused() -> None:
    with pytest.raises(AssertionError, match="needs sample keys"):
        GPT(SMALL, 20, only("final")).train()(IDS)


# What a mask may not depend on.


@pytest.mark.parametrize("dropout", [EVERYWHERE, LOCKED_EVERYWHERE], ids=["element", "locked"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_masks_do_not_depend_on_how_a_batch_is_split(dropout: DropoutConfig, parts: int) -> None:
    model = GPT(SMALL, 20, dropout).train()
    ids = torch.randint(20, (8, 8), generator=torch.Generator().manual_seed(0))
    whole = fallen(model, ids, samples(8))
    size = 8 // parts
    split = [
        fallen(model, ids[at : at + size], samples(size, first=at)) for at in range(0, 8, size)
    ]
    for name, mask in whole.items():
        assert torch.equal(torch.cat([part[name] for part in split]), mask), name


def real_part(name: str, mask: Tensor, inside: slice) -> Tensor:
    """Of a module's output what belongs to real tokens."""
    if name.endswith(("drop_weights", "drop_key")):
        return mask[:, :, inside, inside]
    return mask[:, :, inside] if name.endswith("drop_head") else mask[:, inside]


def padded(ids: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """ids with 7 around them, and where they are real."""
    wide = torch.full((len(ids), left + ids.shape[1] + right), 7)
    wide[:, left : left + ids.shape[1]] = ids
    real = torch.zeros_like(wide, dtype=torch.bool)
    real[:, left : left + ids.shape[1]] = True
    return wide, real


PADDINGS = [(0, 3), (3, 0), (2, 1), (5, 0)]


@pytest.mark.parametrize("dropout", [EVERYWHERE, LOCKED_EVERYWHERE], ids=["element", "locked"])
@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_masks_do_not_depend_on_padding(dropout: DropoutConfig, left: int, right: int) -> None:
    model = GPT(SMALL.model_copy(update={"context_length": 16}), 20, dropout).train()
    alone = fallen(model, IDS, samples())
    around = fallen(model, *(padded(IDS, left, right)[0], samples(), padded(IDS, left, right)[1]))
    for name, mask in alone.items():
        assert torch.equal(real_part(name, around[name], slice(left, left + 8)), mask), name
        if name.endswith(("embedding", "output", "context", "activation", "final", "token")):
            outside = torch.ones(left + 8 + right, dtype=torch.bool)
            outside[left : left + 8] = False
            assert not around[name][:, outside].any(), f"{name} touches padding"


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_gradients_of_real_tokens_do_not_depend_on_padding(
    position: str, left: int, right: int
) -> None:
    config = SMALL.model_copy(update={"context_length": 16, "position": position})
    model = GPT(config, 20, EVERYWHERE).train()
    ids = IDS % 7 + 8  # the padding's own id is nowhere in the text
    wide, real = padded(ids, left, right)

    def gradients(ids: Tensor, real: Tensor | None, inside: slice) -> list[Tensor]:
        model.zero_grad()
        embedded = model.token_embedding(ids)
        seen: list[Tensor] = []
        hook = model.token_embedding.register_forward_hook(
            lambda m, i, o: (o.retain_grad(), seen.append(o))[0]
        )
        model(ids, real, samples=samples())[:, inside].log_softmax(-1)[..., 3].sum().backward()
        hook.remove()
        assert embedded.shape == seen[0].shape
        inner = torch.zeros(ids.shape[1], dtype=torch.bool)
        inner[inside] = True
        assert seen[0].grad is not None
        assert seen[0].grad[:, ~inner].abs().sum() == 0, "padding has a gradient"
        blocks = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
        return [seen[0].grad[:, inner], *blocks]

    alone = gradients(ids, None, slice(0, 8))
    around = gradients(wide, real, slice(left, left + 8))
    for a, b in zip(alone, around, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_row_of_padding_alone_gives_no_nan_in_training() -> None:
    model = GPT(SMALL, 20, EVERYWHERE).train()
    real = torch.tensor([[True] * 8, [False] * 8])
    out = model(IDS, real, samples=samples())
    assert out.isfinite().all()
    out[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_masks_do_not_depend_on_evaluations_in_between() -> None:
    model = GPT(SMALL, 20, EVERYWHERE).train()
    first = fallen(model, IDS, samples(step=3))
    for steps in ((5, 1), (1, 5)):
        for step in steps:
            with evaluating(model):
                logits(model, step)
            logits(model, step)
        again = fallen(model, IDS, samples(step=3))
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_recomputing_activations_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation with other masks gives wrong gradients without a word (OLMo-core PR 828)."""

    def gradients() -> list[Tensor]:
        model = GPT(SMALL, 20, EVERYWHERE).train()
        model(IDS, samples=samples()).log_softmax(-1)[..., 3].sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, forward = gradients(), Block.forward

    def recomputed(block: Block, *inputs: Any) -> Tensor:
        return checkpoint(forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)

    monkeypatch.setattr(Block, "forward", recomputed)
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)


def module_of(site: str, rate: float = 0.3, *, n_head: int = 2, **plan: Any) -> Dropout:
    return Dropout(site, SitePlan(rate, **plan), n_head=n_head).train()


def ones_for(site: str, n: int = 4) -> Tensor:
    sizes = {"B": n, "H": 2, "T": 8, "S": 8, "D": 24, "Z": 48, "C": 24, "F": 40}
    return torch.ones([sizes[letter] for letter in SITES[site].tensor])


def keys_for(n: int = 4, step: int = 0) -> Any:
    return mask_keys(samples(n, step=step), torch.arange(8)[None], None)


@pytest.mark.skipif(
    auto.missing_to_compile(torch.device("cpu")) is not None, reason="no C++ compiler here"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_masks_equal_eager_ones_bit_for_bit() -> None:
    """Forward and backward; torch's own dropout draws other numbers (pytorch 118735)."""
    modules = {site: module_of(site, rate=0.3) for site in SITES}

    def everything(inputs: dict[str, Tensor], keys: Any) -> dict[str, Tensor]:
        return {site: modules[site](x, keys) for site, x in inputs.items()}

    def run(function: Callable[..., dict[str, Tensor]]) -> list[Tensor]:
        inputs = {site: ones_for(site).requires_grad_() for site in SITES}
        outputs = function(inputs, keys_for())
        torch.autograd.backward([y.sum() for y in outputs.values()])
        return [*outputs.values(), *(x.grad for x in inputs.values() if x.grad is not None)]

    for eager, fused in zip(run(everything), run(torch.compile(everything)), strict=True):
        assert torch.equal(eager, fused)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("mode", ["standard", "early", "late"])
def test_a_schedule_compiles_one_graph_for_the_whole_run(mode: str, shape: str) -> None:
    """A rate that is a Python float recompiles whenever it moves (pytorch 149405)."""
    if (mode, shape) != ("standard", "constant"):
        schedule = DropoutSchedule(mode=mode, shape=shape, until=0.5)
    else:
        schedule = DropoutSchedule()
    torch._dynamo.reset()
    counter, model = CompileCounter(), GPT(SMALL, 20, EVERYWHERE).train()
    compiled, results = torch.compile(model, backend=counter, fullgraph=True), []
    for step in range(12):
        set_strength(model, strength_at(step, 12, schedule))
        results.append(compiled(IDS, samples=samples(step=step)).detach())
        torch.testing.assert_close(results[-1], logits(model, step), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# What a mask is.


@pytest.mark.parametrize("masks", ["keyed", "native"])
@pytest.mark.parametrize("site", SITES)
def test_a_site_drops_at_its_rate_and_keeps_the_mean(site: str, masks: str) -> None:
    module, x = module_of(site, 0.25), ones_for(site, n=512)
    module.native = masks == "native"
    torch.manual_seed(0)
    y = module(x, keys_for(512))
    kind = SITES[site]
    shared = [i for i, letter in enumerate(kind.mask) if letter == "1"]
    units = (y == 0).float().mean(dim=shared) if shared else (y == 0).float()
    assert set(units.unique().tolist()) == {0.0, 1.0}, "a unit is dropped in part"
    deviation = (0.25 * 0.75 / units.numel()) ** 0.5
    assert abs(float(units.mean()) - 0.25) < 4 * deviation
    assert y[y != 0].unique().tolist() == [pytest.approx(4 / 3, rel=1e-6)]


@pytest.mark.parametrize("masks", ["keyed", "native"])
@pytest.mark.parametrize("site", LOCKED)
def test_a_locked_site_has_one_mask_for_all_positions(site: str, masks: str) -> None:
    module, x = module_of(site, 0.25, locked=True), ones_for(site, n=64)
    module.native = masks == "native"
    y = module(x, keys_for(64))
    axis = SITES[site].mask.index("T")
    first = y.narrow(axis, 0, 1)
    assert torch.equal(y, first.expand_as(y))
    assert 0 < float((first == 0).float().mean()) < 1
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_exact_in_16_bits(dtype: torch.dtype) -> None:
    """1/0.9 in bfloat16 is 0.16 % too little; the product is rounded once instead. The gradient's
    as well, and where the residual stream takes it in float32 nothing is rounded."""
    exact = 1.25 * torch.tensor(RATES / (RATES - cut_of(0.1)))  # in float32
    for site in SITES:
        x = (ones_for(site).to(dtype) * 1.25).requires_grad_()
        module, keys = module_of(site, 0.1), keys_for()
        y = module(x, keys)
        assert y.dtype == dtype
        assert y[y != 0].unique().tolist() == [exact.to(dtype).item()], site
        (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 1.25))
        assert torch.equal(gradient, y), site
        if SITES[site].by_feature:
            wide = module(x, keys, torch.float32)
            assert wide[wide != 0].unique().tolist() == [exact.item()], site


def test_layers_keep_their_scale_where_the_plan_says_so() -> None:
    y = module_of("layer", 0.5, inverted=False)(ones_for("layer", 64), keys_for(64))
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_a_dropped_layer_is_skipped_whole() -> None:
    model = GPT(SMALL, 20, only("layer", rate=0.5)).train()
    block = model.blocks[0]
    keys = mask_keys(samples(64), torch.arange(8)[None], None)
    x = torch.randn(64, 8, 16)
    with torch.no_grad():
        y = block(x, Scene(None, None, keys), None)
    dropped = [torch.equal(y[i], x[i]) for i in range(64)]
    assert 16 < sum(dropped) < 48


def test_a_hidden_key_leaves_rows_that_sum_to_one_and_no_query_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    original = network.attention_weights

    def spy(*inputs: Any) -> Tensor:
        seen.append(original(*inputs))
        return seen[-1]

    monkeypatch.setattr(network, "attention_weights", spy)
    model = GPT(SMALL, 20, only("key", rate=0.97)).train()
    logits(model, ids=torch.randint(20, (64, 8), generator=torch.Generator().manual_seed(0)))
    for weights in seen:
        torch.testing.assert_close(weights.sum(-1), torch.ones(64, 2, 8))
        assert (weights.diagonal(dim1=-2, dim2=-1) > 0).all()
        hidden = (weights.tril(-1) == 0).float().sum() - 64 * 2 * 36
        assert float(hidden) / (64 * 2 * 28) == pytest.approx(0.97, abs=0.02)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_hidden_keys_are_the_same_in_every_attention_kernel(kernel: str) -> None:
    plain, other = (GPT(SMALL, 20, only("key"), kernel=k).train() for k in ("math", kernel))
    torch.testing.assert_close(logits(plain), logits(other))


def test_dropped_activations_get_exactly_no_gradient() -> None:
    for site in SITES:
        x = ones_for(site).requires_grad_()
        y = module_of(site, 0.5)(x, keys_for())
        y.sum().backward()
        assert torch.equal(x.grad == 0, y == 0), site
        assert torch.equal(x.grad, y), site  # of ones, the gradient is mask times scale, too


@pytest.mark.parametrize(
    ("profile", "rates"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("increasing", [0.1, 0.2, 0.3, 0.4]),
        ("decreasing", [0.4, 0.3, 0.2, 0.1]),
        ([0.0, 1.0, 0.5, 0.25], [0.0, 0.4, 0.2, 0.1]),
    ],
)
@pytest.mark.parametrize("site", [site for site in SITES if SITES[site].per_layer])
def test_profiles_give_every_layer_its_rate(site: str, profile: Any, rates: list[float]) -> None:
    config = SMALL.model_copy(update={"n_layer": 4})
    model = GPT(config, 20, only(site, rate=0.4, profile=profile))
    assert [m.p for m in dropouts(model) if m.site == site] == pytest.approx(rates)
    live = sum(rate > 0 for rate in rates)
    assert planned_sites(model) == {site: live}


# What a config means.


def test_presets_of_equal_placement_have_equal_plans() -> None:
    plans = [DropoutConfig(preset=p).plan() for p in ("gpt2", "raschka", "megatron")]
    plans.append(DropoutConfig(preset="nanogpt", rate=0.1).plan())
    assert all(plan == plans[0] for plan in plans)


def test_presets_name_known_sites_and_the_config_knows_all_presets() -> None:
    for preset in PRESETS.values():
        assert set(preset.sites) <= set(SITES)
    literal = DropoutConfig.model_json_schema()["properties"]["preset"]["enum"]
    assert literal == list(PRESETS)


def test_the_article_names_two_places() -> None:
    for preset, site in {"weights": "attention_weights", "context": "attention_context"}.items():
        rates = DropoutConfig(preset=f"article-{preset}").rates()
        assert [name for name, rate in rates.items() if rate] == [site]


def test_t5_locks_its_sites_over_the_length() -> None:
    plan = DropoutConfig(preset="t5").plan()
    assert all(site.locked for site in plan.values() if site.rate)
    assert len([site for site in plan.values() if site.rate]) == 6


def test_a_site_of_its_own_wins_over_preset_and_rate() -> None:
    given_ = {
        "preset": "t5",
        "rate": 0.2,
        "sites": {"embedding": 0.0, "head": 0.3, "final": {"granularity": "element"}},
    }
    plan = DropoutConfig.model_validate(given_).plan()
    assert plan["embedding"].rate == 0
    assert plan["head"] == SitePlan(0.3)
    assert plan["final"] == SitePlan(0.2, locked=False)
    assert plan["mlp_output"] == SitePlan(0.2, locked=True)


@pytest.mark.parametrize(
    ("mode", "shape", "until", "values"),
    [
        ("standard", "constant", 1.0, [1, 1, 1, 1, 1]),
        ("standard", "linear", 1.0, [0, 0.25, 0.5, 0.75, 1]),
        ("standard", "linear", 0.5, [0, 0.5, 1, 1, 1]),
        ("standard", "cosine", 0.5, [0, 0.5, 1, 1, 1]),
        ("early", "constant", 0.5, [1, 1, 0, 0, 0]),
        ("early", "constant", 1.0, [1, 1, 1, 1, 0]),
        ("early", "linear", 0.5, [1, 0.5, 0, 0, 0]),
        ("early", "cosine", 1.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("late", "constant", 0.5, [0, 0, 1, 1, 1]),
        ("late", "linear", 0.5, [0, 0, 0, 0.5, 1]),
        ("late", "cosine", 0.5, [0, 0, 0, 0.5, 1]),
    ],
)
def test_schedules_have_their_values_at_every_fraction(
    mode: str, shape: str, until: float, values: list[float]
) -> None:
    schedule = DropoutSchedule(mode=mode, shape=shape, until=until)
    found = [strength_at(step, 1000, schedule) for step in (0, 250, 500, 750, 1000)]
    assert found == pytest.approx(values)
    every = [strength_at(step, 1000, schedule) for step in range(1000)]
    assert all(0 <= value <= 1 for value in every)


def test_what_falls_at_a_rate_falls_at_every_higher_one() -> None:
    """So that runs at two rates are a pair, and a rising rate adds to a mask."""
    for site in SITES:
        low, high = (module_of(site, rate)(ones_for(site), keys_for()) == 0 for rate in (0.2, 0.5))
        assert not (low & ~high).any(), site


def test_moving_the_rates_moves_what_drops() -> None:
    model = GPT(SMALL, 20, only("embedding", rate=0.8)).train()
    wide = torch.zeros(2, 8, dtype=torch.long)
    assert 0.6 < fallen(model, wide, samples())["drop_embedding"].float().mean() < 0.95
    set_strength(model, 0.25)
    assert 0.1 < fallen(model, wide, samples())["drop_embedding"].float().mean() < 0.35
    set_strength(model, 0.0)
    assert live_sites(model) == {}
    assert planned_sites(model, 0.0) == {}


def test_copies_of_a_model_move_apart() -> None:
    model = GPT(SMALL, 20, only("embedding")).train()
    twin = copy.deepcopy(model)
    set_strength(model, 0.0)
    assert live_sites(twin) == {"embedding": 1}
    assert int(twin.drop_embedding.cut) == cut_of(0.5)


SITE_CONFIGS = st.fixed_dictionaries(
    {"rate": st.floats(1e-4, 0.95)},
    optional={"granularity": st.sampled_from(["element", "locked"])},
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sites=st.dictionaries(st.sampled_from(list(SITES)), SITE_CONFIGS),
    masks=st.sampled_from(["keyed", "native"]),
    position=st.sampled_from(["learned", "rope"]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    left=st.integers(0, 7),
    seed=st.integers(0, 2**31),
)
def test_no_config_ever_gives_nan(
    sites: dict[str, dict[str, Any]],
    masks: str,
    position: str,
    strength: float,
    left: int,
    seed: int,
) -> None:
    chosen = {
        name: {k: v for k, v in site.items() if k != "granularity" or SITES[name].by_feature}
        for name, site in sites.items()
    }
    dropout = DropoutConfig.model_validate({"preset": "none", "sites": chosen, "masks": masks})
    model = GPT(SMALL.model_copy(update={"position": position}), 20, dropout, seed=seed).train()
    set_strength(model, strength)
    real = torch.arange(8) >= torch.tensor([[left], [0]])
    out = model(IDS, real if left else None, samples=samples(seed=seed))
    nn.functional.cross_entropy(out[:, 7], IDS[:, 0]).backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

"""Every site acts in training and only then; a rate that acts nowhere is an error."""

import pytest
import torch
from torch import nn

from gptlite.config import PRESETS, SITES, DropoutConfig, ModelConfig
from gptlite.dropout import Dropout, dropouts, evaluating, live_sites, planned_sites
from gptlite.errors import ConfigError
from gptlite.model import GPT, NO_DROPOUT

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8)
IDS = torch.arange(16).view(2, 8)


def only(site: str, rate: float = 0.5) -> dict[str, float]:
    return {**NO_DROPOUT, site: rate}


def logits(model: GPT, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("site", SITES)
def test_every_site_acts_in_training_and_only_then(site: str, kernel: str) -> None:
    """A rate in the config that reaches no module would be a silent no-op (nanoGPT's attn_dropout
    next to the fused kernel, nanoGPT PR 240)."""
    model = GPT(SMALL, 20, only(site), kernel=kernel)
    plain = GPT(SMALL, 20, kernel=kernel).eval()
    assert not torch.equal(logits(model.train(), 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(model, 0))
    assert torch.equal(logits(model.eval(), 0), logits(model, 1))
    assert torch.equal(logits(model, 0), logits(plain, 0))


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_is_exact_at_the_highest_rates(preset: str, kernel: str) -> None:
    rate = None if preset == "none" else 0.9
    rates = DropoutConfig(preset=preset, rate=rate).rates()
    model = GPT(SMALL, 20, rates, kernel=kernel).train()
    with evaluating(model):
        assert torch.equal(logits(model, 0), logits(GPT(SMALL, 20, kernel=kernel).eval(), 1))


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
    model = GPT(SMALL, 20, only("embedding"))
    model.drop_embedding = nn.Identity()
    with pytest.raises(
        ConfigError, match=r"dropout\.sites\.embedding: rate 0\.5 reaches no module"
    ):
        planned_sites(model, only("embedding"))
    quiet = GPT(SMALL, 20)
    with pytest.raises(ConfigError, match="reaches no module"):
        planned_sites(quiet, only("mlp_output"))


def test_planned_sites_count_their_modules() -> None:
    rates = DropoutConfig(preset="gpt2").rates()
    planned = planned_sites(GPT(SMALL, 20, rates), rates)
    per_layer = ("attention_weights", "attention_output", "mlp_output")
    assert planned == {"embedding": 1, **dict.fromkeys(per_layer, 2)}


def test_tools_that_look_for_torchs_dropout_find_ours() -> None:
    model = GPT(SMALL, 20, only("mlp_output", 0.3))
    found = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found == dropouts(model)
    for module in found:
        module.p = 0.0
    assert live_sites(model.train()) == {}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_module_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    module, x = Dropout("mlp_output", rate), torch.ones(200_000)
    y = module(x)
    deviation = (rate * (1 - rate) / len(x)) ** 0.5
    assert abs((y == 0).float().mean() - rate) < 4 * deviation
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - rate)))


def test_dropped_activations_get_exactly_no_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    y = Dropout("mlp_output", 0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)


def test_presets_of_equal_placement_have_equal_rates() -> None:
    """gpt2, raschka and megatron name the same four places, so training must be the same."""
    rates = [DropoutConfig(preset=p).rates() for p in ("gpt2", "raschka", "megatron")]
    rates.append(DropoutConfig(preset="nanogpt", rate=0.1).rates())
    assert all(each == rates[0] for each in rates)


def test_a_site_of_its_own_wins_over_preset_and_rate() -> None:
    given = {"preset": "gpt2", "rate": 0.2, "sites": {"embedding": 0.0, "mlp_activation": 0.3}}
    rates = DropoutConfig.model_validate(given).rates()
    assert rates == {
        **NO_DROPOUT,
        "attention_weights": 0.2,
        "attention_output": 0.2,
        "mlp_output": 0.2,
        "mlp_activation": 0.3,
    }

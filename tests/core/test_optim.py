"""Schedules at their ends, and groups that account for every parameter."""

import pytest
import torch
from torch import nn

from gptlite.config.run import ModelConfig, OptimConfig
from gptlite.core.model import GPT
from gptlite.core.optim import OPTIMIZERS, Optimizer, lr_at, split_parameters, weight_decay_at

SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8)
UNTIED = SMALL.model_copy(update={"tie_embeddings": False, "norm": "rmsnorm", "qk_norm": True})


def optim(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_climb_to_the_peak_and_end_where_they_say(schedule: str) -> None:
    o = optim(schedule=schedule)
    rates = [lr_at(step, 110, o) for step in range(110)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert max(rates) <= 1.0
    assert rates[109] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_and_linear_are_halfway_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        assert lr_at(60, 111, optim(schedule=schedule)) == pytest.approx(0.55)


def test_wsd_stays_at_the_peak_for_four_fifths() -> None:
    o = optim(schedule="wsd", warmup_steps=0)
    assert lr_at(79, 101, o) == 1.0
    assert lr_at(90, 101, o) == pytest.approx(0.55)


@pytest.mark.parametrize("max_steps", [1, 2])
def test_the_shortest_runs_have_a_rate(max_steps: int) -> None:
    assert 0 < lr_at(0, max_steps, optim(warmup_steps=0)) <= 1


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_groups_hold_every_parameter_once(config: ModelConfig) -> None:
    model = GPT(config, 20)
    groups = split_parameters(model)
    listed = [p for group in groups.values() for p in group]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in groups["matrices"] + groups["tables"])
    assert all(p.ndim == 1 for p in groups["vectors"])
    assert len(groups["matrices"]) == 4 * config.n_layer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_group_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: nn.Module) -> dict[str, list[nn.Parameter]]:
        groups = split_parameters(model)
        groups["vectors"].pop()
        return groups

    monkeypatch.setattr("gptlite.core.optim.split_parameters", forgetful)
    with pytest.raises(AssertionError, match="without a group"):
        Optimizer(GPT(SMALL, 20), optim(name=name))


def step(model: GPT, optimizer: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(20, (4, 8))
    model(ids).square().mean().backward()
    optimizer.step(0.01)
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_taken_back_goes_on_bit_for_bit(name: str) -> None:
    model = GPT(SMALL, 20)
    optimizer = Optimizer(model, optim(name=name))
    step(model, optimizer, 0)
    assert set(optimizer.state_tensors()) == set(optimizer.expected_state())
    twin = GPT(SMALL, 20)
    twin.load_state_dict(model.state_dict())
    second = Optimizer(twin, optim(name=name))
    second.load_state_tensors({k: v.clone() for k, v in optimizer.state_tensors().items()})
    step(model, optimizer, 1)
    step(twin, second, 1)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_another_optimizer_is_refused() -> None:
    model = GPT(SMALL, 20)
    adam, muon = Optimizer(model, optim()), Optimizer(model, optim(name="muon"))
    step(model, adam, 0)
    with pytest.raises(ValueError, match="do not fit"):
        muon.load_state_tensors(adam.state_tensors())


def test_only_matrices_and_tables_decay() -> None:
    model = GPT(SMALL, 20)
    optimizer = Optimizer(model, optim(weight_decay=0.5))
    before = {n: p.detach().clone() + 0 for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["constant", "with_lr", "linear"])
def test_an_update_takes_lr_times_decay_of_a_weight_as_scheduled(name: str, decay: str) -> None:
    config = optim(
        name=name, lr=0.1, min_lr=0.0, warmup_steps=2, schedule="linear", weight_decay=0.5
    ).model_copy(update={"weight_decay_schedule": decay})
    model = GPT(SMALL, 20)
    optimizer = Optimizer(model, config)
    share = {
        "constant": lambda at: 1.0,
        "with_lr": lambda at: lr_at(at, 10, config) / 0.1,
        "linear": lambda at: 1 - at / 9,
    }[decay]
    for at in range(10):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lr = lr_at(at, 10, config)
        optimizer.step(lr, weight_decay_at(at, 10, config))
        for named, parameter in model.named_parameters():
            left = 1 - lr * 0.5 * share(at) if parameter.ndim == 2 else 1
            torch.testing.assert_close(parameter.detach(), before[named] * left)


def test_adamw_moves_a_weight_that_has_no_gradient() -> None:
    """Why a dropped unit is adjusted all the same: the averages of the updates before go on."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    places = [0.0]
    for gradient in (1.0, 0.0, 0.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        places.append(weight.item())
    moves = [before - after for before, after in zip(places, places[1:], strict=False)]
    assert moves == pytest.approx([1.0, 0.67, 0.52], abs=0.01)

"""Importance of units in networks where it is known."""

import math

import numpy as np
import pytest
import torch
from conftest import Workshop
from networks import CRITICAL, alternating, one_critical_neuron

from gptlite.config.run import ModelConfig
from gptlite.core.model import GPT
from gptlite.measure import importance
from gptlite.measure.importance import effective_share, gini, spectrum, top_share
from gptlite.measure.units import Subject


def test_one_critical_neuron_is_found(workshop: Workshop) -> None:
    subject = Subject(one_critical_neuron(), workshop.run(), alternating())
    found = importance.importance(subject, subject.singles("neuron"), 1)
    increase = np.array(found["loss_increase"])
    assert increase.shape == (1, 32)
    assert increase.argmax() == CRITICAL
    assert increase.max() > 1
    assert abs(np.delete(increase[0], CRITICAL)).max() < 1e-6
    assert found["critical_units"] == 1
    assert found["gini"]["value"] == pytest.approx(31 / 32, abs=1e-3)
    assert found["effective_share"]["value"] == pytest.approx(1 / 32, abs=1e-3)
    assert found["top_1_percent_share"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["split_half"] == pytest.approx(1, abs=1e-3)


def test_two_that_cover_for_each_other_show_in_the_backup(workshop: Workshop) -> None:
    """Of two equal neurons each alone costs less than half of what both together do."""
    model = one_critical_neuron()
    with torch.no_grad():
        mlp = model.blocks[0].mlp
        mlp.up.weight[6] = mlp.up.weight[CRITICAL]
        mlp.down.weight[1, 6] = 1.0
    subject = Subject(model, workshop.run(), alternating())
    singles = subject.singles("neuron")
    found = importance.backup(subject, "neuron", singles, 400)
    assert found["8"]["value"] > 1.2
    alone = Subject(one_critical_neuron(), workshop.run(), alternating())
    one = importance.backup(alone, "neuron", alone.singles("neuron"), 400)
    assert one["8"]["value"] == pytest.approx(1, abs=1e-3)


def test_spread_by_hand() -> None:
    equal, one = np.ones(4), np.array([0.0, 0.0, 3.0, 0.0])
    assert gini(equal) == pytest.approx(0)
    assert gini(one) == pytest.approx(0.75)
    assert gini(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.25)
    assert gini(np.array([-5.0, 1.0, 1.0, -1.0])) == pytest.approx(0.5)
    assert effective_share(equal) == pytest.approx(1)
    assert effective_share(one) == pytest.approx(0.25)
    assert top_share(np.array([1.0] * 199 + [101.0])) == pytest.approx(102 / 300)
    assert math.isnan(gini(np.zeros(3)))
    assert math.isnan(effective_share(-np.ones(3)))
    assert gini(np.stack([equal, one])).tolist() == pytest.approx([0, 0.75])


def test_noise_is_not_critical() -> None:
    """Of 2,048 units of no importance none is, and one that costs 0.05 nats in every row is."""
    rng = np.random.default_rng(0)
    targets = np.full(32, 64.0)
    rise = rng.standard_normal((2048, 32)) * 64 * 0.02
    rise[7] += 0.05 * 64
    assert np.flatnonzero(importance.is_critical(rise, targets)).tolist() == [7]
    assert importance.split_half(rise[100:], targets) == pytest.approx(0, abs=0.1)


def test_of_few_rows_no_more_units_are_critical_by_chance() -> None:
    """In 1 of 100 models whose units all cost nothing some are; by a normal tail it was 1 of 5."""
    rng, targets = np.random.default_rng(0), np.full(6, 64.0)
    models = rng.standard_normal((1500, 48, 6)) * 64
    found = [importance.is_critical(rise, targets).any() for rise in models]
    assert np.mean(found) <= 0.01 + 3 * math.sqrt(0.01 / 1500)
    assert not importance.is_critical(models[0, :, :1] + 1e3, targets[:1]).any()


@torch.no_grad()
def test_norms_of_units_by_hand() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=4, n_kv_head=1, context_length=4), 5)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    found = importance.norm_variation(model)
    values = attention.qkv.weight[-2:]  # one head of values for both
    heads = [float((attention.output.weight[:, i : i + 2] @ values).norm()) for i in (0, 2)]
    neurons = [float(mlp.up.weight[i].norm() * mlp.down.weight[:, i].norm()) for i in range(16)]
    assert found["head"] == [pytest.approx(np.std(heads) / np.mean(heads), rel=1e-5)]
    assert found["neuron"] == [pytest.approx(np.std(neurons) / np.mean(neurons), rel=1e-5)]


def test_dimensionality_of_known_clouds() -> None:
    generator = torch.Generator().manual_seed(0)
    round_ = torch.randn(4000, 8, generator=generator)
    assert spectrum(round_[None], None) == pytest.approx((1, 1), abs=0.02)
    flat = round_[:, :2] @ torch.randn(2, 8, generator=generator)
    participation, rank = spectrum(flat[None], None)
    assert 1 / 8 < participation <= 2 / 8 + 1e-6
    assert 1 / 8 < rank <= 2 / 8 + 1e-6
    real = torch.tensor([[True] * 3000 + [False] * 1000])
    assert spectrum(round_[None], real) == spectrum(round_[None, :3000], None)

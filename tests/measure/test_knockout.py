"""Curves over what is removed, by hand and for a network in which it is known what matters."""

import math

import numpy as np
import pytest
from conftest import Workshop
from networks import CRITICAL, alternating, one_critical_neuron

from gptlite.measure import knockout
from gptlite.measure.intervals import doubt_divisor
from gptlite.measure.knockout import (
    NO_USE,
    contribution_left,
    describe_contribution,
    half_at,
    retained_skill,
)
from gptlite.measure.units import Subject


def test_skill_by_hand() -> None:
    skill = retained_skill(np.array([2.0, 2.5, 3.0, 3.5]), np.array(3.0))
    assert skill.tolist() == [1.0, 0.5, 0.0, -0.5]
    fractions = [0, 0.2, 0.6, 1.0]
    assert half_at(np.array([1.0, 0.75, 0.25, 0.0]), fractions) == pytest.approx(0.4)
    assert math.isinf(half_at(np.array([1.0, 0.9, 0.8, 0.6]), fractions))
    many = half_at(np.array([[1.0, 0.4, 0.3, 0.1], [1.0, 0.9, 0.9, 0.4]]), fractions)
    assert many.tolist() == pytest.approx([0.2 / 0.6 * 0.5, 0.6 + 0.4 * 0.8])


def test_a_curve_knows_what_matters(workshop: Workshop) -> None:
    """In a network with one critical neuron, that is the first to go and the last to stay."""
    model = one_critical_neuron()
    subject = Subject(model, workshop.run(), alternating())
    assert subject.loss < 0.05
    rise = (subject.singles("neuron") - subject.base).sum(1)
    assert rise.argmax() == CRITICAL
    unigram = subject.n_targets * math.log(2)
    fractions = (0, 0.05, 0.5, 1)
    found = knockout.knockout(subject, "neuron", rise, unigram, fractions, 20)
    assert found["most_first"]["loss"][1] == pytest.approx(found["random"]["loss"][-1])
    assert found["least_first"]["loss"][2] == subject.loss
    area = {name: found[name]["retained_area"]["value"] for name in found}
    assert area["most_first"] < area["random"] < area["least_first"]
    assert found["random"]["low"][2] < found["random"]["loss"][2] < found["random"]["high"][2]
    assert found["random"]["retained"][0] == 1
    assert 0 < found["most_first"]["half_at"]["value"] < 0.05
    whole = found["random"]["loss"][-1] - found["random"]["loss"][0]
    assert found["random"]["contribution"]["value"] == pytest.approx(whole)
    assert [found["most_first"]["contribution_left"][i] for i in (0, -1)] == [1, 0]


def test_contribution_by_hand() -> None:
    left = contribution_left(np.array([[2.0, 2.5, 3.5, 4.0], [1.0, 1.0, 1.5, 1.5]]))
    assert left.tolist() == [[1.0, 0.75, 0.25, 0.0], [1.0, 1.0, 0.0, 0.0]]


def test_units_that_do_nothing_keep_their_skill_and_have_no_contribution() -> None:
    """Retained skill calls unused units dispensable; the contribution tells them from redundant
    ones."""
    rng = np.random.default_rng(0)
    base = 2.0 + 0.01 * rng.standard_normal((1000, 1))
    idle = np.tile(base, 4) + 1e-4 * rng.standard_normal((1000, 4))
    fractions = [0, 0.3, 0.6, 1.0]
    doubt = doubt_divisor(idle[:, -1] - idle[:, 0], "rows", NO_USE)
    found = describe_contribution(np.full(4, 2.0), idle, fractions, 100, doubt)
    assert found["contribution_area"]["value"] is None
    assert found["contribution_area"]["reason"] == NO_USE
    used = base + [0, 0.1, 0.2, 0.5]
    found = describe_contribution(np.array([2.0, 2.1, 2.2, 2.5]), used, fractions, 100, None)
    expected = 0.3 * (1 + 0.8) / 2 + 0.3 * (0.8 + 0.6) / 2 + 0.4 * 0.6 / 2
    assert found["contribution_area"]["value"] == pytest.approx(expected)
    assert found["contribution_area"]["low"] <= expected <= found["contribution_area"]["high"]

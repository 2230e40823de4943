"""Removal by hooks against the same done to the weights, and against what must come out."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, Workshop
from torch import nn

from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.model import GPT
from gptlite.data.batches import Batch
from gptlite.measure.knockout import curve, n_removed
from gptlite.measure.units import KINDS, Subject, n_units, random_orders

N_ROWS = 6


def some(workshop: Workshop, **sections: Any) -> tuple[GPT, Batch, Any]:
    """A model with weights large enough that every unit matters, and rows of text for it."""
    run, files = workshop.run(**sections), workshop.files(**sections)
    model = GPT(run.model, files.meta["vocab_size"], EVERYWHERE, seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(0.1 * len(name) / 30)
    (batch,) = files.rows("val", 16).sweep(N_ROWS, N_ROWS)
    return model, batch, run


@pytest.fixture(params=["stream", "documents"])
def subject(workshop: Workshop, request: pytest.FixtureRequest) -> Subject:
    model, batch, run = some(workshop, data={"layout": request.param})
    return Subject(model, run, batch)


def without(kind: str, units: list[int], n: int) -> torch.Tensor:
    removed = torch.zeros(1, n, dtype=torch.bool)
    removed[0, units] = True
    return removed


@torch.no_grad()
def surgery(model: GPT, kind: str, unit: int) -> GPT:
    """The model without a unit, by editing its weights alone."""
    model = copy.deepcopy(model)
    config = model.config
    width = config.n_embd // config.n_head
    if kind == "head":
        layer, head = divmod(unit, config.n_head)
        model.blocks[layer].attention.output.weight[:, head * width : (head + 1) * width] = 0
    elif kind == "neuron":
        layer, neuron = divmod(unit, config.mlp_width)
        model.blocks[layer].mlp.down.weight[:, neuron] = 0
    elif kind == "layer":
        del model.blocks[unit]
    else:
        writers: list[Any] = [
            part for b in model.blocks for part in (b.attention.output, b.mlp.down)
        ]
        for linear in writers:
            linear.weight[unit], linear.bias[unit] = 0, 0
        model.head.weight = nn.Parameter(model.head.weight.clone())  # tied to what is cut
        model.token_embedding.weight[:, unit], model.position_embedding.weight[:, unit] = 0, 0
    return model


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_with_nothing_removed_it_is_the_plain_loss_bit_for_bit(
    workshop: Workshop, layout: str
) -> None:
    model, batch, run = some(workshop, data={"layout": layout})
    lengths = byte_lengths(workshop.files(data={"layout": layout}).tokenizer)
    plain = measure(model, [batch], run, lengths)
    subject = Subject(model, run, batch)
    assert (subject.base.sum(), subject.n_targets.sum()) == (plain.nats, plain.targets)
    for kind in KINDS:
        n = n_units(model, kind)
        assert np.array_equal(subject.row_nats(kind, without(kind, [], n))[0], subject.base)
        (whole,) = curve(subject, kind, random_orders(kind, n, 3), [0.0])
        assert all(np.array_equal(row, subject.base) for row in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_unit_is_as_if_its_weights_were_zero(subject: Subject, kind: str) -> None:
    n = n_units(subject.model, kind)
    for unit in (0, n // 2, n - 1):
        found = subject.row_nats(kind, without(kind, [unit], n))[0]
        again = copy.copy(subject)
        again.model = surgery(subject.model, kind, unit)
        expected = again.row_nats("head", torch.zeros(1, 4, dtype=torch.bool))[0]
        assert found == pytest.approx(expected, rel=1e-5)
        assert abs(found - subject.base).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_see_each_other(subject: Subject, kind: str) -> None:
    """Each row of each mask of a batch is what it is when measured alone."""
    n = n_units(subject.model, kind)
    masks = torch.from_numpy(random_orders("try", n, 5) < n // 2)
    subject.at_once = 3
    together = subject.row_nats(kind, masks)
    subject.at_once = 1
    assert together == pytest.approx(subject.row_nats(kind, masks), rel=1e-5)


def test_without_any_layer_only_the_embedding_speaks(subject: Subject) -> None:
    """Analytic: the output matrix reads the normalised embedding."""
    model = subject.model
    with torch.no_grad():
        x, _ = model.embed(subject.ids, subject.real)
        logits = model.head(model.norm(x)).log_softmax(-1)
    nats = -logits.gather(-1, subject.targets.clamp(min=0)[..., None])[..., 0]
    expected = (nats * (subject.targets >= 0)).double().sum(1).numpy()
    found = subject.row_nats("layer", torch.ones(1, 2, dtype=torch.bool))[0]
    assert found == pytest.approx(expected, rel=1e-6)


def test_without_any_dimension_every_token_is_as_likely(workshop: Workshop) -> None:
    """Analytic: with no residual stream and no bias all logits are 0, the loss log V."""
    model, batch, run = some(workshop, model={"bias": False})
    subject = Subject(model, run, batch)
    found = subject.row_nats("dimension", torch.ones(1, 32, dtype=torch.bool)).sum()
    assert found / subject.n_targets.sum() == pytest.approx(math.log(model.vocab_size), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_single_units_are_what_removing_them_one_by_one_gives(
    subject: Subject, kind: str, ablation: str
) -> None:
    """The fast ways (from the unit's own block on; a neuron by subtraction) change nothing."""
    fills = subject.means(kind) if ablation == "mean" else None
    n = n_units(subject.model, kind)
    one_by_one = subject.row_nats(kind, torch.eye(n, dtype=torch.bool), fills)
    singles = subject.singles(kind, fills)
    assert singles.shape == (n, N_ROWS)
    assert singles == pytest.approx(one_by_one, rel=2e-5)


def test_single_neurons_of_swiglu_too(workshop: Workshop) -> None:
    model, batch, run = some(workshop, model={"mlp": "swiglu", "norm": "rmsnorm", "bias": False})
    subject = Subject(model, run, batch)
    n = n_units(model, "neuron")
    slow = subject.row_nats("neuron", torch.eye(n, dtype=torch.bool))
    assert subject.singles("neuron") == pytest.approx(slow, rel=2e-5)


def test_the_mean_of_a_neuron_is_its_mean_over_real_tokens(subject: Subject) -> None:
    """Removed to their mean, the neurons of a layer are a bias after W2."""
    model, n = subject.model, subject.model.config.mlp_width
    seen: list[torch.Tensor] = []
    handle = model.blocks[0].mlp.drop_activation.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    with torch.no_grad():
        model.features(subject.ids, subject.real)
    handle.remove()
    edited = copy.deepcopy(model)
    with torch.no_grad():
        down = edited.blocks[0].mlp.down
        tokens = seen[0] if subject.real is None else seen[0][subject.real]
        down.bias += down.weight @ tokens.reshape(-1, n).mean(0)
        down.weight.zero_()
    again = copy.copy(subject)
    again.model = edited
    expected = again.row_nats("head", torch.zeros(1, 4, dtype=torch.bool))[0]
    found = subject.row_nats(
        "neuron", without("neuron", list(range(n)), 2 * n), subject.means("neuron")
    )[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_mean_of_a_head_or_layer_has_the_shape_of_its_output(subject: Subject) -> None:
    assert [fill.shape for fill in subject.means("head")] == [(2, 1, 16)] * 2
    assert [fill.shape for fill in subject.means("layer")] == [(32,)] * 4
    assert [fill.shape for fill in subject.means("dimension")] == [(32,)] * 5


def test_nothing_is_left_on_the_model(subject: Subject) -> None:
    subject.singles("head", subject.means("head"))
    subject.model.train()
    subject.row_nats("neuron", torch.ones(1, 256, dtype=torch.bool))
    modules = list(subject.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert all(module.training for module in modules)


def test_masks_are_nested_and_those_of_every_model_of_the_shape() -> None:
    orders = random_orders("neuron", 100, 4)
    assert np.array_equal(orders, random_orders("neuron", 100, 4))
    assert sorted(orders[0]) == list(range(100))
    assert len({tuple(order) for order in orders.tolist()}) == 4
    assert n_removed(0.3, 10) == 3
    assert n_removed(0.29, 100) == 29  # in binary the product is a little less
    assert n_removed(0.05, 16) == 0


def test_random_removal_takes_every_unit_equally_often() -> None:
    ranks = random_orders("head", 12, 3000).argsort(1)
    share = (ranks < 3).mean(0)
    assert abs(share - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 3000)


@pytest.mark.parametrize("kind", KINDS)
def test_every_third_row_is_measured_as_among_the_others(subject: Subject, kind: str) -> None:
    fewer = subject.every(3)
    removed = torch.eye(n_units(subject.model, kind), dtype=torch.bool)[:2]
    assert len(fewer.ids) == 2
    assert fewer.loss == pytest.approx(subject.base[::3].sum() / subject.n_targets[::3].sum())
    expected = subject.row_nats(kind, removed, subject.means(kind))[:, ::3]
    found = fewer.row_nats(kind, removed, subject.means(kind))
    np.testing.assert_allclose(found, expected, rtol=1e-5)

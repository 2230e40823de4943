"""The loop: exact accumulation, exact resume, learning what can be learned and no more."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, prose, state_at, trainer_on

from gptlite.config.run import RunConfig
from gptlite.core.evaluate import byte_lengths, measure, nats_of
from gptlite.core.optim import OPTIMIZERS
from gptlite.core.train import Trainer
from gptlite.data.batches import Batch, batch_at
from gptlite.data.prepare import prepare
from gptlite.errors import DivergedError
from gptlite.planning import auto
from gptlite.runs import checkpoint

DROPS = {"preset": "gpt2", "rate": 0.2, "sites": {"attention_context": 0.1, "mlp_activation": 0.1}}


def trainer(run: RunConfig) -> Trainer:
    files = prepare(run)
    n_rows = files.rows("train", run.model.context_length).n_rows
    resolved, _ = auto.resolve_run(run, vocab_size=files.meta["vocab_size"], n_rows=n_rows)
    return trainer_on(resolved, files)


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.model.named_parameters()}


def equal(a: Trainer, b: Trainer) -> bool:
    left, right = weights(a), weights(b)
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_one_large_part_and_many_small_ones_give_the_same_gradients(
    workshop: Workshop, layout: str
) -> None:
    """transformers PR 34191: a mean of means is not the mean when parts have unequal targets."""
    gradients = []
    for size in (8, 1, 3):
        run = workshop.run(
            data={"layout": layout},
            dropout={"preset": "none"},
            train={"micro_batch_size": size},
        )
        one = trainer(run)
        batch = batch_at(one.rows, seed=1, step=0, batch_size=8)
        one.accumulate(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    workshop: Workshop, tmp_path: Path, name: str, layout: str
) -> None:
    """Six updates at once, and three plus three through files: the same bits, dropout on."""
    run = workshop.run(
        data={"layout": layout},
        optim={"name": name},
        dropout=DROPS,
        train={"micro_batch_size": 4, "max_steps": 6},
    )
    straight = trainer(run)
    losses = [(u.loss, u.grad_norm, u.lr) for u in straight.updates(6)]
    first = trainer(run)
    again = [(u.loss, u.grad_norm, u.lr) for u in first.updates(3)]
    (tmp_path / "checkpoints").mkdir()
    path = checkpoint.save(tmp_path, first.tensors(), state_at(3))
    torch.manual_seed(99)  # whatever state the generator is in
    second = trainer(run)
    checkpoint.restore(second, checkpoint.Checkpoint(path, checkpoint.read_state(path), []))
    again += [(u.loss, u.grad_norm, u.lr) for u in second.updates(6)]
    assert again == losses
    assert equal(second, straight)


def test_what_happens_between_updates_changes_nothing(workshop: Workshop) -> None:
    """nanoGPT draws evaluation batches from the training generator: there it changes the data."""
    run = workshop.run(dropout=DROPS, train={"max_steps": 6})
    quiet, busy = trainer(run), trainer(run)
    for _ in quiet.updates(6):
        pass
    lengths = byte_lengths(workshop.files().tokenizer)
    for _ in busy.updates(6):
        val = workshop.files().rows("val", run.model.context_length).sweep(8)
        measure(busy.model, val, busy.run, lengths)
        torch.rand(7)
    assert equal(quiet, busy)


def test_masks_differ_between_steps_and_parts(workshop: Workshop) -> None:
    run = workshop.run(dropout={"preset": "gpt2", "rate": 0.5}, train={"micro_batch_size": 4})
    one = trainer(run)
    part = np.zeros((4, 16), dtype=np.int64)
    batch = Batch(np.concatenate((part, part)), np.concatenate((part, part)), None)
    seen = []
    original = one.model.forward

    def spy(*args: Any, **more: Any) -> torch.Tensor:
        logits = original(*args, **more)
        seen.append(logits.detach().clone())
        return logits

    one.model.forward = spy  # type: ignore[method-assign]
    one.accumulate(batch)
    one.step = 1
    one.accumulate(batch)
    one.step = 0
    one.accumulate(batch)
    assert torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_batch_is_learned_by_heart(workshop: Workshop, name: str) -> None:
    run = workshop.run(
        dropout={"preset": "none"},
        optim={"name": name, "lr": 5e-3, "min_lr": 1e-3, "warmup_steps": 10},
        train={"max_steps": 250},
    )
    one = trainer(run)
    batch = next(one.rows.sweep(4))
    loss = math.inf
    for step in range(250):
        one.model.zero_grad()
        loss = one.accumulate(batch).item()
        one.optimizer.step(5e-3 * (1 - step / 260))
    assert loss < 0.05


def markov_text(n: int) -> tuple[str, float]:
    """Text of a first-order source over four letters, and its entropy rate in nats."""
    transition = np.array(
        [[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.1], [0.4, 0.4, 0.1, 0.1], [0.0, 0.5, 0.0, 0.5]]
    )
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    logs = np.log(transition, where=transition > 0, out=np.zeros_like(transition))
    entropy = float(-(stationary[:, None] * transition * logs).sum())
    draws, cumulative = np.random.default_rng(7).random(n), transition.cumsum(1)
    states = [0]
    for draw in draws.tolist():
        states.append(int(np.searchsorted(cumulative[states[-1]], draw)))
    return "".join("abcd"[state] for state in states), entropy


def test_a_known_source_is_learned_to_its_entropy_and_not_below(workshop: Workshop) -> None:
    """Below the entropy would mean that the targets leak into the inputs."""
    text, entropy = markov_text(400_000)
    workshop.text.write_text(text)
    run = workshop.run(
        model={"n_layer": 1, "context_length": 32},
        dropout={"preset": "none"},
        optim={"lr": 1e-2, "min_lr": 1e-4, "warmup_steps": 20},
        train={"max_steps": 300, "batch_size": 32},
    )
    one, files = trainer(run), prepare(run)
    for _ in one.updates(300):
        pass
    val = files.rows("val", 32).sweep(64)
    result = measure(one.model, val, one.run, byte_lengths(files.tokenizer)).report()
    noise = 3 * result["loss_standard_error"]
    assert entropy - noise <= result["loss"] <= entropy + 0.02


def test_a_loss_that_is_not_finite_never_reaches_the_weights(workshop: Workshop) -> None:
    one = trainer(workshop.run())
    updates = one.updates(8)
    next(updates)
    before = weights(one)
    with torch.no_grad():
        one.model.norm.weight[0] = math.inf
    with pytest.raises(DivergedError, match=r"step 2: loss (nan|inf)"):
        next(updates)
    after = weights(one)
    assert all(torch.equal(before[n], after[n]) for n in before if n != "norm.weight")


def test_an_update_leaves_every_generator_alone(workshop: Workshop) -> None:
    one = trainer(workshop.run(dropout=DROPS))
    updates = one.updates(4)
    next(updates)
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    torch_state = torch.get_rng_state()
    next(updates)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state


def test_clipping_bounds_the_gradient(workshop: Workshop) -> None:
    one = trainer(workshop.run(optim={"grad_clip": 1e-3}))
    next(one.updates(1))
    free = trainer(workshop.run(optim={"grad_clip": 0.0}))
    assert next(free.updates(1)).grad_norm > 1e-3


def test_losses_count_real_targets_only() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, -1], [0, -1, -1]])
    rows = torch.nn.functional.log_softmax(logits, -1)
    by_hand = -(rows[0, 0, 1] + rows[0, 1, 2] + rows[1, 0, 0])
    torch.testing.assert_close(nats_of(logits, targets, "sum"), by_hand)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiling_keeps_the_losses(workshop: Workshop) -> None:
    """In place: the names of the weights stay as they are."""
    if auto.missing_to_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler on this machine")
    run = workshop.run(model={"n_layer": 1}, dropout={"preset": "none"})
    plain, compiled = trainer(run), trainer(run.model_copy(update={"compile": True}))
    assert list(weights(plain)) == list(weights(compiled))
    for a, b in zip(plain.updates(2), compiled.updates(2), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_prose_is_the_same_at_every_call() -> None:
    assert prose(50) == prose(50)


def test_parts_of_a_batch_drop_what_the_whole_would(workshop: Workshop) -> None:
    """One pass over eight rows and eight over one: the same masks, so the same losses."""
    whole, parts = (
        trainer(workshop.run(dropout=DROPS, train={"micro_batch_size": size})) for size in (8, 1)
    )
    for a, b in zip(whole.updates(4), parts.updates(4), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


@pytest.mark.parametrize("preset", ["raschka", "megatron", "nanogpt"])
def test_presets_of_equal_placement_train_to_the_same_bits(workshop: Workshop, preset: str) -> None:
    rate = 0.1 if preset == "nanogpt" else None
    ours = trainer(workshop.run(dropout={"preset": preset, "rate": rate}))
    gpt2 = trainer(workshop.run(dropout={"preset": "gpt2"}))
    assert [u.loss for u in ours.updates(4)] == [u.loss for u in gpt2.updates(4)]
    assert equal(ours, gpt2)


def test_scheduled_rates_are_set_logged_and_checked(workshop: Workshop) -> None:
    schedule = {"mode": "early", "shape": "linear", "until": 0.5}
    one = trainer(workshop.run(dropout={**DROPS, "schedule": schedule}))
    rates = [update.dropout_rates for update in one.updates(8)]
    assert [rate["embedding"] for rate in rates] == pytest.approx(
        [0.2, 0.15, 0.1, 0.05, 0, 0, 0, 0]
    )
    assert set(rates[0]) == {site for site, rate in one.run.dropout.rates().items() if rate}
    again = trainer(workshop.run(dropout={**DROPS, "schedule": schedule}))
    updates = again.updates(8)
    next(updates)
    again.model.drop_embedding.p = 0.0  # as tools do that switch dropout off
    next(updates)  # the schedule sets it anew
    again.model.drop_embedding.eval()
    with pytest.raises(AssertionError, match="live dropout sites are not the planned"):
        next(updates)


def test_a_schedule_repeats_itself_after_a_resume(workshop: Workshop, tmp_path: Path) -> None:
    schedule = {"mode": "late", "shape": "cosine", "until": 0.25}
    run = workshop.run(dropout={**DROPS, "schedule": schedule}, train={"micro_batch_size": 4})
    straight, first, second = trainer(run), trainer(run), trainer(run)
    losses = [u.loss for u in straight.updates(8)]
    again = [u.loss for u in first.updates(5)]
    (tmp_path / "checkpoints").mkdir()
    path = checkpoint.save(tmp_path, first.tensors(), state_at(5))
    checkpoint.restore(second, checkpoint.Checkpoint(path, checkpoint.read_state(path), []))
    assert again + [u.loss for u in second.updates(8)] == losses
    assert equal(second, straight)

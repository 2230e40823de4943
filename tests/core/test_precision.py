"""float16: a scaled loss, overflows that leave the weights alone, and a scale that is resumed."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERYWHERE, Workshop, trainer_on
from ranks import begun, ended, together
from test_resume import poison, timeless, weights
from test_train import trainer

from gptlite import storage
from gptlite.config.run import RunConfig
from gptlite.core import device as devices
from gptlite.core import precision as scaling
from gptlite.core.optim import OPTIMIZERS
from gptlite.core.precision import FIRST_SCALE, LossScaler, Scale
from gptlite.core.train import Trainer
from gptlite.core.world import World
from gptlite.errors import CheckpointError, ConfigError, DivergedError
from gptlite.planning import auto, memory
from gptlite.planning.audit import audit
from gptlite.planning.plan import plan_run
from gptlite.runs import checkpoint
from gptlite.runs.start import resolve_on_all_ranks, train

CPU = torch.device("cpu")
KEYED = EVERYWHERE.model_dump(mode="json")
DROPS = {"none": {"preset": "none"}, "keyed": KEYED, "native": {**KEYED, "masks": "native"}}
GROWTH_INTERVAL = 3
"""Updates, so that the scale grows in short runs; torch's is 2000."""


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that overflows at first, and grows soon."""
    monkeypatch.setattr(scaling, "FIRST_SCALE", 2.0**34)
    growing = partial(torch.amp.GradScaler, growth_interval=GROWTH_INTERVAL)
    monkeypatch.setattr(torch.amp, "GradScaler", growing)


# It learns what float32 learns


@pytest.mark.parametrize("dropout", DROPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_are_close_to_those_of_float32(workshop: Workshop, name: str, dropout: str) -> None:
    """With Muon, too, whose products stay in float32; the same masks fall."""
    sections = {"optim": {"name": name}, "dropout": DROPS[dropout], "train": {"max_steps": 30}}
    whole, half = (
        trainer(workshop.run(dtype=dtype, attention="math", **sections))
        for dtype in ("float32", "float16")
    )
    losses = [[update.loss for update in one.updates(30)] for one in (whole, half)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][-1] < losses[1][0] - 0.1
    assert losses[1] != losses[0]
    assert half.scaler.overflows == 0


def gradients_of(run: RunConfig) -> torch.Tensor:
    """Those of the first update, as the optimizer gets them."""
    one, found = trainer(run), []

    def look(lr: float, weight_decay: float) -> None:
        found.append(torch.cat([p.grad.flatten() for p in one.parameters if p.grad is not None]))

    one.optimizer.step = look  # type: ignore[method-assign]
    next(one.updates(1))
    return found[0]


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", [{}, {"position": "rope", "qk_norm": True, "mlp": "swiglu"}])
def test_gradients_are_those_of_float32(
    workshop: Workshop,
    layout: str,
    name: str,
    model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scaled and divided again, and clipped by their own norm."""
    monkeypatch.setattr(scaling, "FIRST_SCALE", 2.0**9)  # so few targets have large gradients
    sections = {"dropout": KEYED, "data": {"layout": layout}, "model": model}
    sections["optim"] = {"name": name}
    whole, half = (
        gradients_of(workshop.run(dtype=dtype, **sections)) for dtype in ("float32", "float16")
    )
    assert (half - whole).norm() < 3e-3 * whole.norm()


def test_recomputing_changes_no_bit(workshop: Workshop) -> None:
    plain, again = (
        trainer(workshop.run(dtype="float16", dropout=KEYED, train={"recompute": recompute}))
        for recompute in (False, True)
    )
    assert [u.loss for u in plain.updates(6)] == [u.loss for u in again.updates(6)]


# Nothing is scaled elsewhere


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_other_precisions_nothing_is_scaled(dtype: str) -> None:
    scaler, loss = LossScaler(dtype, CPU), torch.ones((), requires_grad=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = gradient = torch.tensor([1.0, math.inf])
    assert scaler.scale(loss) is loss
    scaler.unscale([torch.optim.SGD([parameter])])
    assert parameter.grad is gradient
    assert gradient.tolist() == [1.0, math.inf]
    assert not scaler.take_overflow(1.0)
    assert scaler.update() == {}
    assert scaler.state() is None


def test_only_rows_of_float16_tell_of_it(workshop: Workshop) -> None:
    for dtype, keys in (("float32", set()), ("float16", {"loss_scale", "overflows"})):
        train(workshop.run(dtype=dtype), workshop.folder / dtype)
        rows = timeless(workshop.folder / dtype)
        assert all(row.keys() & {"loss_scale", "overflows"} == keys for row in rows)
        stored = checkpoint.choose(workshop.folder / dtype, "last").state.loss_scale
        assert (stored is not None) is bool(keys)
    assert [(row["loss_scale"], row["overflows"]) for row in rows] == [(FIRST_SCALE, 0)] * 8


# Overflows


def test_an_overflow_leaves_the_weights_alone_and_halves_the_scale(
    workshop: Workshop, huge: None
) -> None:
    """More of them than may be skipped: they are no sign of a run that goes wrong."""
    one = trainer(workshop.run(dtype="float16", train={"max_steps": 40}))
    before = [p.detach().clone() for p in one.parameters]
    scales: list[float] = []
    for update in one.updates(40):
        scales.append(update.loss_scaling["loss_scale"])
        overflowed = not math.isfinite(update.grad_norm)
        assert math.isfinite(update.loss)
        if update.loss_scaling["overflows"] == update.step:
            assert overflowed
            assert all(map(torch.equal, before, one.parameters))
            assert not one.optimizer.state_tensors()
    first = one.scaler.overflows
    assert first > 12
    assert scales[:14] == [2.0**34 / 2**n for n in range(14)]
    assert one.skipped == []
    assert not any(map(torch.equal, before, one.parameters))
    assert all(state.isfinite().all() for state in one.optimizer.state_tensors().values())
    grown = [after / before for before, after in zip(scales, scales[1:], strict=False)]
    assert set(grown) == {0.5, 1.0, 2.0}


def saved_scales(directory: Path) -> dict[int, Scale]:
    """Of every checkpoint, by its step."""
    states = [checkpoint.read_state(folder) for folder in checkpoint.folders(directory)]
    return {state.step: state.loss_scale for state in states if state.loss_scale is not None}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_in_float16_repeats_the_uninterrupted_one(
    workshop: Workshop, huge: None, name: str
) -> None:
    """Bit for bit: before its first update that was none, and while the scale is about to grow."""
    steps = {"max_steps": 30, "save_interval": 1, "keep_last": "all", "eval_interval": 10}
    run = workshop.run(dtype="float16", optim={"name": name}, dropout=KEYED, train=steps)
    straight, directory = workshop.folder / "straight", workshop.folder / "run"
    train(run, straight)
    scales = saved_scales(straight)
    grows = [max(s for s in scales if scales[s].growth_tracker == n) for n in (1, 2)]
    for cut in (4, *grows):
        shutil.copytree(straight, directory)
        for step in range(cut + 1, 31):
            shutil.rmtree(directory / "checkpoints" / checkpoint.folder_name(step))
        train(run, directory, resume=True)
        same = weights(directory, 30) == weights(straight, 30)
        assert same, cut  # a difference of bytes would take minutes to print
        assert timeless(directory) == timeless(straight)
        assert saved_scales(directory) == scales
        shutil.rmtree(directory)
    assert scales[4].overflows == 4
    assert scales[30].overflows >= 13


def spoil(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Have every gradient hold this value, while the loss stays as it is."""
    accumulate = Trainer.accumulate

    def spoilt(self: Trainer, batch: Any) -> torch.Tensor:
        loss = accumulate(self, batch)
        assert self.parameters[0].grad is not None
        self.parameters[0].grad[0, 0] = value
        return loss

    monkeypatch.setattr(Trainer, "accumulate", spoilt)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(("policy", "step"), [("stop", 17), ("skip", 27)])
def test_a_scale_that_falls_to_nothing_is_a_run_that_diverged(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, value: float, policy: str, step: int
) -> None:
    """From 2**16 to 1 it is halved; then the gradients are at fault."""
    spoil(monkeypatch, value)
    steps = {"on_nonfinite": policy, "max_steps": 100}
    run, directory = workshop.run(dtype="float16", train=steps), workshop.folder / "run"
    with pytest.raises(DivergedError, match=rf"step {step}: loss 3.*dtype float32"):
        train(run, directory)
    state = checkpoint.choose(directory, "last").state
    assert state.loss_scale is not None
    assert state.loss_scale.overflows == 16
    assert state.step == step - 1
    assert len(state.skipped) == step - 17


def test_a_loss_that_is_not_finite_is_no_overflow(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3, 5)
    run = workshop.run(dtype="float16", train={"on_nonfinite": "skip"})
    train(run, workshop.folder / "run")
    state = checkpoint.choose(workshop.folder / "run", "last").state
    assert state.skipped == [3, 5]
    assert state.loss_scale is not None
    assert state.loss_scale.overflows == 0
    with pytest.raises(DivergedError, match="step 3: loss nan"):
        train(workshop.run(dtype="float16"), workshop.folder / "stopping")


# Going on elsewhere


def test_the_scale_waits_while_a_run_goes_on_in_another_precision(
    workshop: Workshop, huge: None
) -> None:
    """Where float16 is all that there is, where it is not, and back; from overflows alone, too."""
    directory = workshop.folder / "run"
    for max_steps, dtype in ((4, "float16"), (6, "float32"), (8, "float16")):
        steps = {"max_steps": max_steps}
        train(workshop.run(dtype=dtype, train=steps), directory, resume=max_steps > 4)
        stored = checkpoint.choose(directory, "last").state.loss_scale
        overflows = 4 if max_steps < 8 else 6
        assert stored == Scale(scale=2.0 ** (34 - overflows), growth_tracker=0, overflows=overflows)


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": -1.0}, {"growth_tracker": -1}, {"overflows": "x"}, {"a": 1}]
)
def test_a_scale_that_cannot_be_is_a_damaged_checkpoint(
    workshop: Workshop, wrong: dict[str, Any]
) -> None:
    train(workshop.run(dtype="float16"), workshop.folder / "run")
    at = checkpoint.folders(workshop.folder / "run")[-1] / "state.json"
    state = json.loads(at.read_text())
    state["loss_scale"] |= wrong
    state.pop("sha256", None)
    at.write_text(storage.seal({k: v for k, v in state.items() if k != "seal"}))
    with pytest.raises(CheckpointError, match=r"state.json: damaged \(loss_scale"):
        checkpoint.read_state(at.parent)


# What is chosen around it


def test_asked_for_on_a_cpu_it_says_what_it_costs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "native_precisions", lambda device: {"float32"})
    monkeypatch.setattr(devices, "slowdown", lambda name, device: 3.0)
    _, reasons = auto.resolve_run(workshop.run(dtype="float16"), vocab_size=50, n_rows=100)
    assert reasons["dtype"] == (
        "float16: asked for, though this CPU has no float16: a matrix product takes 3.0 times as "
        "long as in float32"
    )


def test_the_compiled_loops_know_no_float16_and_the_plan_does_not_say_so(
    workshop: Workshop,
) -> None:
    run = workshop.run(dtype="float16", dropout=KEYED)
    resolved, reasons = auto.resolve_run(run, vocab_size=50, n_rows=100)
    assert resolved.attention == "math"
    assert reasons["dropout.masks"] == "keyed, by torch"
    with pytest.raises(ConfigError, match="attention: fused knows no float16; set auto"):
        auto.resolve_run(workshop.run(dtype="float16", attention="fused"), vocab_size=9, n_rows=9)


def test_a_plan_counts_two_bytes_and_its_audit_finds_gradients(workshop: Workshop) -> None:
    """Unscaled, more of them would be exactly zero."""
    shares, needs, batch = [], [], {"batch_size": 512, "micro_batch_size": 512}
    for dtype in ("float32", "float16"):
        run = workshop.run(dtype=dtype, dropout=KEYED, attention="math", train=batch)
        planned = plan_run(run)
        needs.append(memory.block_bytes(planned.run))
        found = audit(planned.run, planned.model, planned.rows)
        assert found["problems"] == []
        shares.append(found["zero_gradient_share"]["dropout_off"])
    assert shares[1] == pytest.approx(shares[0], abs=1e-4)
    bf16 = planned.run.model_copy(update={"dtype": "bfloat16"})
    assert needs[1] == memory.block_bytes(bf16) < needs[0]


# Ranks


def updated(run: RunConfig, workshop: Workshop, scale: float, world: World) -> Any:
    """Losses of 24 updates from this scale, the scale and number of overflows after them, and the
    weights."""
    scaling.FIRST_SCALE = scale
    resolved, _ = resolve_on_all_ranks(run, workshop.files(), World(world.size), {"float32"})
    one = trainer_on(resolved, workshop.files(), world)
    losses = [update.loss for update in one.updates(24)]
    raw = b"".join(p.detach().numpy().tobytes() for p in one.parameters)
    state = one.scaler.state()
    assert state is not None
    return [losses, state.scale, state.overflows, sha256(raw).hexdigest()]


def test_ranks_overflow_together(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP adds gradients up before anyone looks at them, so all see the same. It divides by the
    number of ranks, so the loss is multiplied by that: two ranks at a scale are one at twice it."""
    scale = 2.0**30
    monkeypatch.setattr(scaling, "FIRST_SCALE", scale)  # taken back afterwards
    steps = {"max_steps": 24, "micro_batch_size": 2}
    run = workshop.run(dtype="float16", dropout=KEYED, train=steps)
    work = partial(updated, run, workshop, scale)
    first, second = together(2, work, workshop.folder / "ranks")
    assert first == second
    losses, last_scale, overflows, _ = updated(run, workshop, 2 * scale, World())
    assert (first[1] * 2, first[2]) == (last_scale, overflows)
    assert 8 < overflows < 20
    assert first[0] == pytest.approx(losses, rel=1e-4)


def trained_by_ranks(run: RunConfig, directory: Path, world: World) -> Any:
    return train(run, directory, world=world)


def test_gradients_in_parts_are_refused_in_one_line(workshop: Workshop) -> None:
    run = workshop.run(dtype="float16", distributed={"engine": "fsdp"})
    place, directory = workshop.folder / "ranks", workshop.folder / "run"
    found = ended(begun(2, partial(trained_by_ranks, run, directory), place), place)
    line = "distributed.engine: fsdp splits gradients, which float16 checks whole; set ddp"
    assert [rank.exit_code for rank in found] == [2, 2]
    assert [rank.said.strip() for rank in found] == [line, ""]
    assert not directory.exists()


def test_auto_chooses_no_precision_that_its_engine_refuses(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GPUs that have float16 and no bfloat16."""
    chosen: Callable[..., Any] = lambda device, own: (["float16"], "this GPU has no bfloat16")  # noqa: E731
    monkeypatch.setattr(auto, "precisions", chosen)
    for engine, dtype, why in (
        ("fsdp", "float32", "fsdp splits gradients, which float16 checks whole"),
        ("ddp", "float16", "this GPU has no bfloat16"),
        ("auto", "float16", "this GPU has no bfloat16"),
    ):
        run = workshop.run(dtype="auto", distributed={"engine": engine})
        sizes = {"vocab_size": 50, "n_rows": 100}
        resolved, reasons = auto.resolve_run(run, **sizes, world=World(2))
        assert (resolved.dtype, reasons["dtype"]) == (dtype, f"{dtype}: {why}")
        alone, _ = auto.resolve_run(run, **sizes)
        assert alone.dtype == "float16"
    assert reasons["distributed.engine"] == "ddp: whole gradients, which float16 checks"
    stored = run.model_copy(update={"dtype": "float16"})  # by DDP, or in one process
    fsdp = stored.distributed.model_copy(update={"engine": "fsdp"})
    with pytest.raises(ConfigError, match=r"engine: fsdp splits gradients, .*; set ddp"):
        auto.resolve_run(stored.model_copy(update={"distributed": fsdp}), **sizes, world=World(2))

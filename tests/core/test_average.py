"""The average of weights: what it is, that training does not see it, and that it is resumed."""

from pathlib import Path

import pytest
import torch
from conftest import Workshop, trainer_on

from gptlite.config.run import RunConfig
from gptlite.core.train import Trainer
from gptlite.core.weights import FILES, RAW, model_tensors
from gptlite.planning.memory import training_bytes
from gptlite.runs import checkpoint
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

AVERAGED = {
    "average": "ema",
    "average_half_life": 3.0,
    "max_steps": 8,
    "micro_batch_size": 4,
    "recompute": False,
}


def averaged(workshop: Workshop, **train: object) -> RunConfig:
    return workshop.run(attention="math", dropout={"rate": 0.2}, train={**AVERAGED, **train})


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model_tensors(trainer.model).items()}


def test_it_is_the_weighted_mean_of_all_weights_so_far(workshop: Workshop) -> None:
    """Recomputed from the weights after each update."""
    trainer, seen = trainer_on(averaged(workshop), workshop.files()), []
    assert trainer.average is not None
    for _ in trainer.updates(8):
        seen.append(weights_of(trainer))
        shares = torch.tensor([0.5 ** ((len(seen) - 1 - i) / 3) for i in range(len(seen))])
        shares /= shares.sum()
        for name, mean in trainer.average.tensors.items():
            want = sum(share * each[name] for share, each in zip(shares, seen, strict=True))
            torch.testing.assert_close(mean, want)


def test_training_does_not_see_it(workshop: Workshop) -> None:
    plain = trainer_on(averaged(workshop, average="none"), workshop.files())
    with_it = trainer_on(averaged(workshop), workshop.files())
    losses = [(u.loss, u.grad_norm) for u in plain.updates(8)]
    found = []
    for update in with_it.updates(8):
        found.append((update.loss, update.grad_norm))
        before = weights_of(with_it)
        with with_it.evaluated():
            assert not torch.equal(with_it.model.head.weight, before["token_embedding.weight"]) or (
                update.step == 1
            )
        after = weights_of(with_it)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert found == losses


def test_an_exception_inside_leaves_the_weights_as_they_were(workshop: Workshop) -> None:
    trainer = trainer_on(averaged(workshop), workshop.files())
    for _ in trainer.updates(3):
        pass
    before = weights_of(trainer)
    with pytest.raises(KeyboardInterrupt), trainer.evaluated():
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())


def test_a_resumed_run_repeats_the_uninterrupted_one(workshop: Workshop) -> None:
    straight, parts = workshop.folder / "straight", workshop.folder / "parts"
    train(averaged(workshop, eval_interval=2), straight)
    train(averaged(workshop, eval_interval=2, max_steps=8, save_interval=4), parts)
    for path in (parts / "checkpoints").glob("step-00000008"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (parts / "checkpoints" / "last").write_text("step-00000004\n")
    (parts / "checkpoints" / "best").write_text("step-00000004\n")
    train(averaged(workshop, eval_interval=2, save_interval=4), parts, resume=True)
    last = [checkpoint.choose(each, "last").path for each in (straight, parts)]
    for name in (*FILES, RAW):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_what_is_loaded_is_what_was_evaluated(workshop: Workshop) -> None:
    directory = workshop.folder / "run"
    summary = train(averaged(workshop), directory)
    trained = load_trained(directory, "last")
    trainer = trainer_on(averaged(workshop), workshop.files())
    for _ in trainer.updates(8):
        pass
    assert trainer.average is not None
    for name, mean in trainer.average.tensors.items():
        assert torch.equal(trained.model.get_parameter(name), mean)
    assert summary["val_loss"] == pytest.approx(summary["best"]["val_loss"])


def test_a_checkpoint_without_the_weights_of_the_last_update_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    """As an import makes it, or a run that was not averaged."""
    directory = workshop.folder / "run"
    train(averaged(workshop, average="none"), directory)
    trainer = trainer_on(averaged(workshop), workshop.files())
    with pytest.raises(checkpoint.CheckpointError, match=r"raw\.safetensors"):
        checkpoint.restore(trainer, checkpoint.choose(directory, "last"))


def test_the_estimate_of_memory_counts_it(workshop: Workshop) -> None:
    run = averaged(workshop)
    plain = run.model_copy(update={"train": run.train.model_copy(update={"average": "none"})})
    more = training_bytes(run, 1000, 4, False) - training_bytes(plain, 1000, 4, False)
    assert more == pytest.approx(1.1 * 4 * run.model.n_parameters(1000), abs=2)


def test_a_half_life_below_one_is_a_share_of_the_run(workshop: Workshop) -> None:
    run = averaged(workshop, average_half_life=0.5)
    assert run.half_life(300) == 150
    assert run.half_life(1) == 1
    assert averaged(workshop).half_life(300) == 3

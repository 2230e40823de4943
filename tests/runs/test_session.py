"""A run in its directory: stops, samples, checkpoints, and weights to start from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, merged

from gptlite.core import tensor_files
from gptlite.errors import CheckpointError, ConfigError, DivergedError
from gptlite.runs import checkpoint
from gptlite.runs.session import Session
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

LEARN = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2}


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_stops_learning_stops(workshop: Workshop, monkeypatch: Any) -> None:
    """The losses are given: better twice, then two evaluations without a gain."""
    from gptlite.core.evaluate import Measured

    losses = iter([3.0, 2.0, 2.5, 2.2, 9.0, 9.0])
    val = iter(range(100))

    def measure(*args: Any, **kwargs: Any) -> Measured:
        loss = next(losses) if next(val) % 2 == 0 else 1.0  # validation first, then training text
        return Measured(loss * 10, 0.0, 10, 0, loss * 10, 10, [], torch.zeros(2, 0))

    monkeypatch.setattr("gptlite.runs.session.measure", measure)
    run = workshop.run(train={"max_steps": 12, "eval_interval": 2, "early_stop": 2})
    directory = workshop.folder / "run"
    summary = train(run, directory)
    assert (summary["ended"], summary["steps"], summary["best"]["step"]) == ("early_stop", 8, 4)
    assert summary["best"]["val_loss"] == 2.0
    assert checkpoint.choose(directory, "best").path.name == "step-00000004"
    assert checkpoint.choose(directory, "last").path.name == "step-00000008"
    again = train(run, directory, resume=True)
    assert (again["ended"], again["steps"]) == ("early_stop", 8)


def test_losses_fall_and_three_of_them_are_logged(workshop: Workshop) -> None:
    run = workshop.run(
        optim=LEARN, dropout={"preset": "gpt2", "rate": 0.3}, train={"max_steps": 100}
    )
    train(run, workshop.folder / "run")
    rows = [row for row in rows_of(workshop.folder / "run") if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3
    assert rows[-1]["train/loss_dropout_off"] < rows[-1]["train/loss"]


def test_evaluation_and_sampling_and_saving_leave_the_losses_alone(workshop: Workshop) -> None:
    runs = []
    for eval_interval, interval, save_interval in ((8, 0, 8), (1, 1, 1), (3, 2, 5)):
        run = workshop.run(
            dropout={"preset": "gpt2", "rate": 0.3},
            train={"eval_interval": eval_interval, "save_interval": save_interval},
            sample={"interval": interval},
        )
        directory = workshop.folder / f"run-{eval_interval}"
        train(run, directory)
        weights = checkpoint.choose(directory, "last").path / "model.safetensors"
        losses = [(row["train/loss"], row["grad_norm"]) for row in rows_of(directory)]
        runs.append((losses, weights.read_bytes()))
    assert runs[0] == runs[1] == runs[2]


def test_samples_are_written_while_training(workshop: Workshop) -> None:
    run = workshop.run(sample={"interval": 3, "prompts": ["the ", "of"]})
    train(run, workshop.folder / "run")
    samples = sorted((workshop.folder / "run" / "samples").iterdir())
    assert [p.stem for p in samples] == ["step-00000003", "step-00000006", "step-00000008"]
    assert all(p.read_text().startswith("the ") for p in samples)


def test_a_run_knows_which_tokens_its_text_never_had(workshop: Workshop) -> None:
    """They are pushed to be unlikely together, and each is followed by the others."""
    run = workshop.run(
        tokenizer={"kind": "bpe", "vocab_size": 280},
        train={"max_steps": 4},
        sample={"max_new_tokens": 60, "temperature": 9},
    )
    train(run, workshop.folder / "run")
    trained = load_trained(workshop.folder / "run", "best")
    text, unseen = trained.tokenizer, set(trained.unseen)
    tokens = set(workshop.files(tokenizer={"kind": "bpe", "vocab_size": 280}).tokens("train"))
    assert unseen == set(range(text.vocab_size)) - tokens
    assert text.eot in unseen
    (sample,) = (workshop.folder / "run" / "samples").iterdir()
    assert "\ufffd" not in sample.read_text()
    assert set(sample.read_text()) <= set(workshop.text.read_text())


def test_a_run_of_a_version_that_did_not_write_them_down_is_read(workshop: Workshop) -> None:
    train(workshop.run(train={"max_steps": 4}), workshop.folder / "run")
    path = workshop.folder / "run" / "tokenizer" / "unseen.json"
    path.write_text(path.read_text().replace("]", ", 99999]"))
    with pytest.raises(CheckpointError, match="unseen.json: damaged"):
        load_trained(workshop.folder / "run", "best")
    path.unlink()
    assert load_trained(workshop.folder / "run", "best").unseen == ()


def test_who_goes_on_from_another_model_may_sample_all_that_it_knows(workshop: Workshop) -> None:
    settings = {"tokenizer": {"kind": "byte"}, "train": {"max_steps": 4}}
    train(workshop.run(**settings), workshop.folder / "first")
    second = workshop.run(init_from=str(workshop.folder / "first"), **settings)
    train(second, workshop.folder / "second")
    assert load_trained(workshop.folder / "first", "best").unseen
    assert load_trained(workshop.folder / "second", "best").unseen == ()


def test_checkpoints_are_kept_as_asked(workshop: Workshop) -> None:
    run = workshop.run(optim=LEARN, train={"save_interval": 1, "keep_last": 2})
    train(run, workshop.folder / "run")
    kept = [p.name for p in checkpoint.folders(workshop.folder / "run")]
    assert kept[-2:] == ["step-00000007", "step-00000008"]
    assert len(kept) <= 3


def test_the_best_checkpoint_outlives_all_others(workshop: Workshop) -> None:
    getting_worse = {"lr": 3.0, "min_lr": 3.0, "warmup_steps": 0}
    train_ = {"save_interval": 1, "keep_last": 2, "eval_interval": 2}
    summary = train(workshop.run(optim=getting_worse, train=train_), workshop.folder / "run")
    kept = [int(p.name[-8:]) for p in checkpoint.folders(workshop.folder / "run")]
    assert kept == [summary["best"]["step"], 7, 8]


def test_a_run_can_start_from_the_weights_of_another(workshop: Workshop) -> None:
    train(workshop.run(optim=LEARN, train={"max_steps": 40}), workshop.folder / "first")
    first = rows_of(workshop.folder / "first")
    run = workshop.run(init_from=str(workshop.folder / "first"), optim={"lr": 1e-6, "min_lr": 0.0})
    train(run, workshop.folder / "second")
    second = rows_of(workshop.folder / "second")
    assert abs(second[0]["train/loss"] - first[-1]["train/loss"]) < 0.2
    assert second[0]["train/loss"] < first[0]["train/loss"] - 0.3


def test_weights_that_do_not_fit_are_refused(workshop: Workshop) -> None:
    train(workshop.run(), workshop.folder / "first")
    run = workshop.run(init_from=str(workshop.folder / "first"), model={"n_embd": 16})
    with pytest.raises(CheckpointError, match="do not fit this model"):
        train(run, workshop.folder / "second")
    with pytest.raises(ConfigError, match="not a run, a checkpoint of one, or a Hugging Face dir"):
        train(workshop.run(init_from=str(workshop.folder)), workshop.folder / "third")
    assert not (workshop.folder / "third").exists()


def test_a_diverged_run_keeps_its_last_good_checkpoint(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workshop.run(train={"save_interval": 2})
    evaluate = Session.evaluate

    def poison(self: Session, step: int) -> dict[str, float]:
        row = evaluate(self, step)
        with torch.no_grad():
            self.trainer.model.norm.weight.fill_(torch.inf)
        return row

    monkeypatch.setattr(Session, "save", once_clean(Session.save))
    monkeypatch.setattr(Session, "evaluate", poison)
    with pytest.raises(DivergedError, match="step 5"):
        train(run, workshop.folder / "run")
    path = checkpoint.choose(workshop.folder / "run", "step-2").path
    weights = tensor_files.read_tensors(path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def once_clean(save: Any) -> Any:
    """Saving only what is finite, as the loop guarantees when nobody poisons it."""

    def guarded(self: Session) -> None:
        if all(p.isfinite().all() for p in self.trainer.model.parameters()):
            save(self)

    return guarded


def test_other_text_is_not_the_same_run(workshop: Workshop) -> None:
    run = workshop.run()
    train(run, workshop.folder / "run")
    workshop.text.write_text(workshop.text.read_text() + "the end")
    with pytest.raises(ConfigError, match="the text is not the one this run was trained on"):
        train(run, workshop.folder / "run", resume=True)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_one_short_text_is_enough_for_any_tokenizer(
    workshop: Workshop, kind: str, layout: str
) -> None:
    workshop.text.write_text("It was the best of times,\nit was the worst of times.\n")
    run = workshop.run(
        data={"layout": layout, "val_fraction": 0.4},
        tokenizer={"kind": kind, "vocab_size": 300},
        model={"context_length": 64},
        train={"max_steps": 2},
        optim={"warmup_steps": 0},
    )
    assert train(run, workshop.folder / "run")["steps"] == 2


def test_a_model_that_gives_nan_ends_the_run_with_its_step(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are finite, so nothing notices before the evaluation."""
    updates = Session.train

    def train_on(self: Session) -> str:
        with torch.no_grad():
            self.trainer.model.norm.weight.fill_(1e38)
            self.trainer.model.norm.bias.fill_(-1e38)
        self.evaluate(self.trainer.step)
        return updates(self)

    monkeypatch.setattr(Session, "train", train_on)
    with pytest.raises(DivergedError, match="^step 0: evaluation loss (nan|inf)") as caught:
        train(workshop.run(), workshop.folder / "run")
    assert caught.value.exit_code == 4


def test_a_text_shorter_than_the_context_is_continued_within_what_was_trained(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "It was the best of times, it was the worst of times. "
    workshop.text.write_text(text)
    short = {"model": {"context_length": 64}, "data": {"val_fraction": 0.4}}
    train(workshop.run(**short), workshop.folder / "short")
    assert "no row of the text has more than 30 tokens, so later" in capsys.readouterr().err
    trained = load_trained(workshop.folder / "short", "best")
    assert trained.state.trained_length == 30
    workshop.text.write_text(text * 10)
    whole = workshop.run(model={"context_length": 64})
    train(whole, workshop.folder / "whole")
    assert load_trained(workshop.folder / "whole", "best").state.trained_length is None
    workshop.text.write_text(text[:40])
    for name, length in (("short", 30), ("whole", None)):
        begun = workshop.run(**short, init_from=str(workshop.folder / name))
        train(begun, workshop.folder / f"after-{name}")
        again = load_trained(workshop.folder / f"after-{name}", "best")
        assert again.state.trained_length == length
    for position in ("rope", "learned"):
        run = workshop.run(**merged(short, {"model": {"position": position}}))
        train(run, workshop.folder / position)
        found = load_trained(workshop.folder / position, "last").state.trained_length
        assert (found is None) == (position == "rope")

"""What an ensemble is worth: held against its definitions, and against averaged passes."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Workshop

from gptlite.cli.evaluate import evaluate_ensemble
from gptlite.cli.trained import choose_runs, load_members
from gptlite.core.ensemble import Ensemble
from gptlite.core.evaluate import byte_lengths, measure
from gptlite.errors import ConfigError
from gptlite.measure.ensemble import check_members, measure_ensemble
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained


@pytest.fixture
def runs(workshop: Workshop) -> list[Path]:
    found = []
    for seed in (1, 2, 3):
        directory = workshop.folder / f"run-{seed}"
        run = workshop.run(
            seed=seed, dropout={"rate": 0.2}, optim={"lr": 0.02}, train={"max_steps": 30}
        )
        train(run, directory)
        found.append(directory)
    return found


def watch(work, name, total=None):
    return work


def test_the_losses_are_those_of_the_models_and_of_their_mean(
    workshop: Workshop, runs: list[Path]
) -> None:
    members = load_members(runs, "last")
    files = workshop.files()
    lengths = byte_lengths(files.tokenizer)
    sweep = partial(files.rows("val", 16).sweep, 8)
    some = list(sweep(16))
    found = measure_ensemble(members, sweep(), some, lengths, watch)
    each = [measure(member.model, sweep(), member.run, lengths) for member in members]
    assert found["member_loss"] == pytest.approx([one.loss for one in each], rel=1e-6)
    assert found["mean_member_loss"]["value"] == pytest.approx(sum(o.loss for o in each) / 3)
    for mean in ("logits", "probabilities"):
        model = Ensemble([member.model for member in members], mean)
        want = measure(model, sweep(), members[0].run, lengths)
        ours = found[f"mean_of_{mean}"]
        assert ours["loss"]["value"] == pytest.approx(want.loss, rel=1e-6)
        assert ours["bits_per_byte"] == pytest.approx(want.bits_per_byte, rel=1e-6)
        assert ours["minus_mean_member"]["value"] == pytest.approx(
            want.loss - found["mean_member_loss"]["value"], abs=1e-6
        )
        assert ours["minus_mean_member"]["value"] < 0
    passes = found["mc_dropout"]
    assert passes["passes"] == 3
    assert passes["ensemble_minus_mean_member"]["value"] < 0
    assert math.isfinite(passes["averaged_minus_deterministic"]["value"])


def test_an_ensemble_of_one_is_the_model_and_gains_nothing(
    workshop: Workshop, runs: list[Path]
) -> None:
    found = evaluate_ensemble(runs[:1], "last", "val", fast=False)["ensemble"]
    (loss,) = found["member_loss"]
    for mean in ("logits", "probabilities"):
        assert found[f"mean_of_{mean}"]["loss"]["value"] == loss
        assert found[f"mean_of_{mean}"]["minus_mean_member"]["value"] == 0
    assert found["mc_dropout"] == {"note": "one model"}


def test_models_without_dropout_have_no_passes_to_compare_with(workshop: Workshop) -> None:
    for seed in (1, 2):
        run = workshop.run(seed=seed, dropout={"preset": "none"})
        train(run, workshop.folder / f"plain-{seed}")
    plain = [workshop.folder / f"plain-{seed}" for seed in (1, 2)]
    found = evaluate_ensemble(plain, "last", "val", fast=True)["ensemble"]
    assert found["mc_dropout"] == {"note": "these models have no dropout to keep on"}


def member(workshop: Workshop, name: str, **sections: object) -> Trained:
    train(workshop.run(**sections), workshop.folder / name)
    return load_trained(workshop.folder / name, "last")


def test_models_that_read_unlike_texts_are_refused(workshop: Workshop) -> None:
    chars = member(workshop, "chars")
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_members([chars, member(workshop, "bytes", tokenizer={"kind": "byte"})])
    data = chars.run.data.model_copy(update={"layout": "documents"})
    documents = replace(chars, run=chars.run.model_copy(update={"data": data}))
    with pytest.raises(ConfigError, match=r"data\.layout documents, the first on stream"):
        check_members([chars, documents])


@pytest.mark.parametrize(
    ("runs", "ensemble", "run", "word"),
    [
        (["a"], False, None, "--ensemble"),
        (None, True, None, "needs run directories"),
        (["a"], True, "b", "takes no --run"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    runs: list[str] | None, ensemble: bool, run: str | None, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        choose_runs(runs, ensemble, run)


def test_a_shorter_context_is_that_of_all(workshop: Workshop) -> None:
    long = member(workshop, "long", model={"context_length": 32})
    short = member(workshop, "short")
    model = Ensemble([long.model, short.model])
    assert model.config.context_length == 16
    found = evaluate_ensemble(
        [workshop.folder / "long", workshop.folder / "short"], "last", "val", fast=True
    )
    assert found["ensemble"]["models"] == 2
    assert torch.isfinite(torch.tensor(found["ensemble"]["member_loss"])).all()

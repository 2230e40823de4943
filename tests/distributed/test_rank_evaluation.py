"""Evaluation dealt out to several ranks: the numbers of one process, bit for bit."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, prose
from ranks import begun, ended, together
from test_distributed import run_of
from typer.testing import CliRunner

from gptlite.cli import evaluate as evaluate_command
from gptlite.cli import main
from gptlite.config.run import RunConfig
from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.model import GPT
from gptlite.core.world import ALONE, World
from gptlite.data.prepare import open_split
from gptlite.measure import suites
from gptlite.runs.start import train
from gptlite.runs.trained import load_on_all_ranks


def measured(run: RunConfig, workshop: Workshop, world: World) -> Any:
    files = workshop.files()
    model = GPT.of_run(run, files.meta["vocab_size"])
    batches = files.rows("val", run.model.context_length).sweep(3, 20)
    found = measure(model, batches, run, byte_lengths(files.tokenizer), world=world)
    return found.report()


def test_an_evaluation_by_several_ranks_is_the_number_of_one(workshop: Workshop) -> None:
    """Bit for bit, though the last of seven batches falls to one of four ranks."""
    run = run_of(workshop)
    one = json.loads(json.dumps(measured(run, workshop, World())))
    for size in (2, 4):
        found = together(size, partial(measured, run, workshop), workshop.folder / "ranks")
        assert all(each == found[0] for each in found)
        places = found[0].pop("loss_by_position")
        assert places == pytest.approx(one["loss_by_position"], rel=1e-12)
        assert found[0] == {name: one[name] for name in found[0]}


@pytest.fixture
def trained(workshop: Workshop) -> Path:
    """A run with dropout and torch's own masks."""
    masks = {"preset": "gpt2", "rate": 0.3, "masks": "native"}
    run = workshop.run(attention="math", dropout=masks, train={"max_steps": 4})
    train(run, workshop.folder / "run")
    return workshop.folder / "run"


def evaluated(directories: list[Path], split: str, active: bool, world: World) -> Any:
    """As the command does; each rank sees a directory and perhaps a text of its own."""
    of = load_on_all_ranks(directories[world.rank % len(directories)], "best", world)
    own = split.replace("RANK", str(world.rank))
    files = partial(world.make_in_turn, partial(open_split, of.run, of.tokenizer, own))
    found = suites.run_suites(of, own, ["loss"], files, dropout_active=active, world=world)
    return json.loads(json.dumps(found["loss"]))


@pytest.mark.parametrize("active", [False, True], ids=["dropout off", "dropout on"])
@pytest.mark.parametrize("split", ["val", "text.txt"])
def test_a_trained_model_is_measured_by_several_as_by_one(
    workshop: Workshop, trained: Path, split: str, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "eval_rows", lambda *_: 7)
    monkeypatch.chdir(workshop.folder)
    one = evaluated([trained], split, active, ALONE)
    assert ("dropout_penalty" in one) == (split == "val" and not active)
    places = one.pop("loss_by_position")
    for size in (2, 3):
        of = partial(evaluated, [trained], split, active)
        found = together(size, of, workshop.folder / "ranks")
        for each in found:
            assert each.pop("loss_by_position") == pytest.approx(places, rel=1e-12)
            assert each == one


def test_ranks_with_other_text_or_weights_measure_nothing(
    workshop: Workshop, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    for rank in (0, 1):
        Path(f"{rank}.txt").write_text(prose(200, seed=rank))
    found = ended(begun(2, partial(evaluated, [trained], "RANK.txt", False), Path("r")), Path("r"))
    assert [rank.exit_code for rank in found] == [2, 2]
    assert found[0].said == "--split 0.txt: rank 1 has other text than rank 0\n"
    other = workshop.folder / "other"
    train(workshop.run(attention="math", seed=2, train={"max_steps": 4}), other)
    of = partial(evaluated, [trained, other], "val", False)
    found = ended(begun(2, of, Path("r")), Path("r"))
    assert [rank.exit_code for rank in found] == [3, 3]
    assert found[0].said == f"{trained}: rank 1 has another step 4 than rank 0\n"


@pytest.mark.parametrize("suite", ["knockout", "loss,calibration", "all", "lm-eval"])
def test_the_other_suites_are_for_one_process(
    trained: Path, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "join_ranks", lambda: nullcontext(World(2)))
    result = CliRunner().invoke(main.app, ["eval", "--run", str(trained), "--suite", suite])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    why = "several processes measure the loss only; start without torchrun"
    assert line == f"--suite {suite}: {why}"

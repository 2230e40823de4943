"""The Python door: what it gives is what the commands give, and the masks are those of training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERYWHERE, Workshop, prose
from torch import Tensor
from typer.testing import CliRunner

import gptlite
from gptlite.cli.main import app
from gptlite.core.dropout import Dropout, dropouts
from gptlite.core.masks import sample_keys
from gptlite.data.batches import batch_at
from gptlite.errors import ConfigError, DataError
from gptlite.runs.export import prepare_hf, save
from gptlite.runs.opened import Run
from gptlite.runs.start import train

CHARACTERS: dict[str, Any] = {"tokenizer": {"kind": "char"}}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Run:
    workshop = Workshop(tmp_path_factory.mktemp("opened"))
    directory = workshop.folder / "run"
    train(workshop.run(dropout=EVERYWHERE.model_dump(mode="json"), **CHARACTERS), directory)
    return gptlite.load(directory)


def command(*args: str) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_importing_it_loads_no_torch() -> None:
    code = "import gptlite, sys; sys.exit('torch' in sys.modules or not gptlite.load)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_text_is_that_of_the_command(opened: Run) -> None:
    options = ["--max-new-tokens", "30", "--temperature", "0.7", "--top-k", "5", "--seed", "3"]
    asked = ["--prompt", "The of", *options]
    (expected,) = command("generate", "--run", str(opened.directory), *asked)["results"]
    given = {"max_new_tokens": 30, "temperature": 0.7, "top_k": 5, "seed": 3}
    assert opened.generate("The of", **given) == expected["text"]
    pieces = opened.generate("The of", stream=True, **given)
    assert "".join(pieces) == expected["text"]
    stop = expected["text"][5:8]
    assert opened.generate("The of", stop=[stop], **given) == expected["text"].partition(stop)[0]


def test_half_precision_is_that_of_the_command_and_touches_no_other_number(
    workshop: Workshop,
) -> None:
    directory = workshop.folder / "run"
    train(workshop.run(dtype="bfloat16", **CHARACTERS), directory)
    run = gptlite.load(directory)
    before = run.loss("the of and")
    (expected,) = command("generate", "--run", str(directory), "--prompt", "The")["results"]
    assert run.generate("The") == expected["text"]
    assert run.loss("the of and") == before
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_a_measurement_is_that_of_the_command(opened: Run) -> None:
    expected = command("eval", "--run", str(opened.directory), "--suite", "loss,calibration")
    found = opened.evaluate("val", ["loss", "calibration"])
    assert found == {name: expected[name] for name in ("loss", "calibration")}
    assert opened.evaluate() == {"loss": expected["loss"]}


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_the_loss_of_a_text_is_that_of_a_file_with_it(workshop: Workshop, layout: str) -> None:
    directory, path = workshop.folder / "run", workshop.folder / "some.txt"
    train(workshop.run(data={"layout": layout}, **CHARACTERS), directory)
    text = prose(30, seed=5).replace("\n", " ").strip()
    path.write_text(text)
    expected = command("eval", "--run", str(directory), "--split", str(path))["loss"]
    found = gptlite.load(directory).loss(text)
    assert found == pytest.approx({name: expected[name] for name in found})


def fallen_in_training(run: Run, step: int, row: int) -> tuple[str, dict[str, list[Any]]]:
    """A row of an update, and by site and layer what passes there and what of it falls."""
    files = workshop_files(run)
    layout = files.rows("train", run.config.model.context_length)
    size = run.config.train.batch_size
    batch = batch_at(layout, seed=run.config.seed, step=step, batch_size=size)
    found: dict[str, dict[Any, Any]] = {}

    def keep(module: Dropout, args: Any, output: Tensor) -> None:
        before, after = args[0][row : row + 1], output[row : row + 1]
        passes = before != 0
        found.setdefault(module.site, {})[module] = (passes, passes & (after == 0))

    model = run.model.train()
    handles = [module.register_forward_hook(keep) for module in dropouts(model)]
    ids = torch.from_numpy(batch.inputs)
    with torch.no_grad():
        model(ids, samples=sample_keys(run.config.seed, step, np.arange(size)))
    model.eval()
    for handle in handles:
        handle.remove()
    of_site = {site: list(layers.values()) for site, layers in found.items()}
    return run.tokenizer.decode(batch.inputs[row].tolist()), of_site


def workshop_files(run: Run) -> Any:
    from gptlite.data.prepare import prepare

    return prepare(run.config)


@pytest.mark.parametrize(("step", "row"), [(0, 0), (3, 1)])
def test_what_falls_is_what_falls_in_training(opened: Run, step: int, row: int) -> None:
    opened.model.train(False)
    for block in opened.model.blocks:
        block.attention.kernel = "math"  # so that the weights can be seen
    text, training = fallen_in_training(opened, step, row)
    masks = opened.dropout_masks(text, step=step, row=row)
    assert set(masks) == set(training) == set(opened.config.dropout.rates())
    for site, layers in masks.items():
        assert any(mask.any() for mask in layers), site
        for mask, (passes, falls) in zip(layers, training[site], strict=True):
            assert torch.equal(mask & passes, falls)


def test_looking_at_masks_changes_nothing(opened: Run) -> None:
    before = opened.generate("The of")
    modes = [(m.training, m.p) for m in dropouts(opened.model)]
    masks = opened.dropout_masks("The of")
    again = opened.dropout_masks("The of")
    for site, layers in masks.items():
        assert all(map(torch.equal, layers, again[site]))
    assert [(m.training, m.p) for m in dropouts(opened.model)] == modes
    assert opened.generate("The of") == before


def test_masks_that_torch_draws_are_not_shown(workshop: Workshop) -> None:
    directory = workshop.folder / "run"
    dropout = {"preset": "gpt2", "rate": 0.2, "masks": "native"}
    train(workshop.run(dropout=dropout, **CHARACTERS), directory)
    with pytest.raises(ConfigError, match=r"dropout.masks: native at .*; set keyed"):
        gptlite.load(directory).dropout_masks("the")


def test_a_run_is_trained_from_a_mapping_and_opened(workshop: Workshop) -> None:
    config = workshop.run(**CHARACTERS).model_dump(mode="json", exclude={"out_dir"})
    run = gptlite.train(config, workshop.folder / "mine")
    assert run.directory == workshop.folder / "mine"
    rows = run.metrics()
    assert rows[-1]["step"] == run.config.train.max_steps
    assert "val/loss" in rows[-1]
    with pytest.raises(ConfigError, match="contains a run"):
        gptlite.train(config, workshop.folder / "mine")
    assert gptlite.train(config, workshop.folder / "mine", resume=True).step == run.step


def test_where_a_run_may_be(opened: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened.directory is not None
    last = next((opened.directory / "checkpoints").glob("step-*"))
    assert gptlite.load(last).step == int(last.name.removeprefix("step-"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(opened.directory)
    monkeypatch.chdir(tmp_path)
    assert gptlite.load("latest").step == opened.step
    save(prepare_hf(opened.trained), tmp_path / "hf")
    foreign = gptlite.load(tmp_path / "hf")
    assert foreign.directory is None
    assert foreign.metrics() == []
    greedy = {"temperature": 0.0, "max_new_tokens": 40}
    assert foreign.generate("The", **greedy) == opened.generate("The", **greedy)


def test_mistakes_are_the_commands_with_the_place(opened: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        gptlite.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"^temperature: must be"):
        opened.generate("x", temperature=-1)
    with pytest.raises(ConfigError, match=r"^max_new_tokns: unknown|max_new_tokns"):
        opened.generate("x", max_new_tokns=3)
    with pytest.raises(ConfigError, match="text: .*'é'"):
        opened.loss("é")
    with pytest.raises(DataError, match="text: 1 token; give at least 2"):
        opened.loss("t")
    with pytest.raises(ConfigError, match="optim.lr: must be"):
        gptlite.train({"data": {"source": "x.txt"}, "optim": {"lr": -1}})


def test_a_notebook_shows_the_report_or_what_there_is(opened: Run) -> None:
    assert opened.directory is not None
    assert "step" in opened._repr_html_()
    (opened.directory / "report.html").write_text("<p>a page</p>")
    assert 'srcdoc="&lt;p&gt;a page' in opened._repr_html_()
    (opened.directory / "report.html").unlink()

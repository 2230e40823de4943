"""`init_from`: a run that begins with the weights, the model and the tokenizer of another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Workshop, merged, prose
from safetensors.torch import save_file
from typer.testing import CliRunner

from gptlite import storage
from gptlite.cli.main import app
from gptlite.config.run import RunConfig
from gptlite.core import tensor_files
from gptlite.core.weights import model_tensors
from gptlite.data.prepare import prepare
from gptlite.data.token_files import TokenFiles
from gptlite.errors import ConfigError, DataError
from gptlite.runs import origin, recipe
from gptlite.runs.export import prepare_hf, save
from gptlite.runs.importing import import_model
from gptlite.runs.origin import load_run
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained
from gptlite.studies.config import load_study

BPE: dict[str, Any] = {"tokenizer": {"kind": "bpe", "vocab_size": 300}}


@pytest.fixture
def first(workshop: Workshop) -> Path:
    """A run with a tokenizer that it has learned."""
    train(workshop.run(**BPE), workshop.folder / "first")
    return workshop.folder / "first"


class Desk:
    """Writes configs that name no model of their own."""

    def __init__(self, workshop: Workshop) -> None:
        self.folder = workshop.folder
        self.text = workshop.folder / "other.txt"
        self.text.write_text("Quite another text! " + prose(2500, seed=5))

    def config(self, source: Path, **sections: Any) -> Path:
        left_out = ("model", "tokenizer")
        plain = {name: value for name, value in TINY.items() if name not in left_out}
        data = {"source": str(self.text), "cache_dir": str(self.folder / "cache")}
        plain = merged({**plain, "data": data, "init_from": str(source)}, sections)
        path = self.folder / "tuned.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path


@pytest.fixture
def desk(workshop: Workshop) -> Desk:
    return Desk(workshop)


def prepare_with_origin(run: RunConfig) -> TokenFiles:
    return prepare(run, origin.given_tokenizer(run))


def sources(first: Path) -> dict[str, Path]:
    """Everything that `init_from` can name, of one model."""
    hugging_face = first.parent / "hf"
    save(prepare_hf(load_trained(first, "best")), hugging_face)
    imported = import_model(str(hugging_face), first.parent / "imported", None)
    checkpoint = first / "checkpoints" / "step-00000008"
    return {"run": first, "checkpoint": checkpoint, "hf": hugging_face, "imported": imported}


def test_new_data_and_rates_with_the_old_model_and_tokenizer(first: Path, desk: Desk) -> None:
    before = load_trained(first, "last")
    for name, source in sources(first).items():
        path = desk.config(source, dropout={"rate": 0.4}, optim={"lr": 1e-9, "min_lr": 0.0})
        run = load_run([str(path)])
        assert run.model == before.run.model, name
        assert run.dropout.rate == 0.4
        train(run, desk.folder / f"tuned-{name}")
        after = load_trained(desk.folder / f"tuned-{name}", "last")
        assert after.tokenizer.encode("another text") == before.tokenizer.encode("another text")
        ours, theirs = model_tensors(after.model), model_tensors(before.model)
        assert all((ours[key] - theirs[key]).abs().max() < 1e-6 for key in ours), name


def test_a_value_that_disagrees_is_named_with_its_place(first: Path, desk: Desk) -> None:
    path = desk.config(first, model={"n_layer": 3, "context_length": 8}, tokenizer={"kind": "byte"})
    with pytest.raises(ConfigError) as refused:
        load_run([str(path)], ["model.n_head=4"])
    told = "\n".join(refused.value.problems)
    assert "model.n_layer: is 3, but init_from" in told
    assert "has 2; leave it out" in told
    assert "--set model.n_head: is 4" in told
    assert "tokenizer.kind: is byte" in told
    assert "context_length" not in told
    assert all(str(path) in line or "--set" in line for line in refused.value.problems)


def test_a_shorter_context_keeps_the_first_positions(first: Path, desk: Desk) -> None:
    path = desk.config(first, model={"context_length": 8}, optim={"lr": 1e-9, "min_lr": 0.0})
    train(load_run([str(path)]), desk.folder / "short")
    ours = load_trained(desk.folder / "short", "last").model.position_embedding.weight
    theirs = load_trained(first, "last").model.position_embedding.weight
    assert ours.shape[0] == 8
    assert torch.allclose(ours, theirs[:8], atol=1e-6)


def test_a_run_goes_on_and_is_measured_when_its_origin_is_gone(first: Path, desk: Desk) -> None:
    path = desk.config(first)
    directory = desk.folder / "tuned"
    train(load_run([str(path)]), directory)
    shutil.rmtree(first)
    stored = load_run([str(directory / "config.yaml")], ["train.max_steps=12"])
    assert train(stored, directory, resume=True)["steps"] == 12
    result = CliRunner().invoke(app, ["eval", "--run", str(directory)])
    assert result.exit_code == 0, result.output


def test_data_that_the_tokenizer_cannot_have_made_are_refused(
    first: Path, desk: Desk, workshop: Workshop
) -> None:
    files = workshop.files(tokenizer={"kind": "byte"})
    path = desk.config(first, data={"source": str(files.folder)})
    with pytest.raises(DataError, match="of another tokenizer than the model"):
        prepare_with_origin(load_run([str(path)]))
    train(workshop.run(tokenizer={"kind": "byte"}), workshop.folder / "bytes")
    path = desk.config(workshop.folder / "bytes", data={"layout": "documents"})
    with pytest.raises(ConfigError, match=r"data\.layout: documents need an end-of-text token"):
        prepare_with_origin(load_run([str(path)]))


def test_token_files_of_two_origins_are_told_apart(
    first: Path, desk: Desk, workshop: Workshop
) -> None:
    other = workshop.folder / "learned.txt"
    other.write_text("zebra quagga okapi " * 300)
    train(workshop.run(**BPE, data={"source": str(other)}), workshop.folder / "second")
    folders = [
        prepare_with_origin(load_run([str(desk.config(source))])).folder
        for source in (first, workshop.folder / "second")
    ]
    assert folders[0] != folders[1]


def test_documents_are_parted_by_what_the_model_ends_with(first: Path, desk: Desk) -> None:
    """A model for chats: three special tokens, of which the last ends a text."""
    hugging_face = sources(first)["hf"]
    path, weights = hugging_face / "tokenizer.json", hugging_face / "model.safetensors"
    whole, tensors = json.loads(path.read_text()), tensor_files.read_tensors(weights)
    (plain,), n = whole["added_tokens"], len(tensors["transformer.wte.weight"])
    more = [
        {**plain, "id": n + i, "content": f"<|im_{c}|>"} for i, c in enumerate(("start", "end"))
    ]
    storage.write_json(path, {**whole, "added_tokens": [plain, *more]})
    table = tensors["transformer.wte.weight"]
    save_file({**tensors, "transformer.wte.weight": torch.cat([table, table[:2] + 1])}, weights)
    storage.write_json(hugging_face / "generation_config.json", {"eos_token_id": [n + 1]})
    config = json.loads((hugging_face / "config.json").read_text())
    storage.write_json(hugging_face / "config.json", {**config, "vocab_size": n + 2})
    several = desk.folder / "several.jsonl"
    several.write_text("".join(json.dumps({"text": prose(40, seed=i)}) + "\n" for i in range(50)))
    run = load_run([str(desk.config(hugging_face, data={"source": str(several)}))])
    files = prepare_with_origin(run)
    counts = {i: int((files.tokens("train") == i).sum()) for i in (n - 1, n, n + 1)}
    assert counts[n + 1] > 40
    assert (counts[n - 1], counts[n], files.meta["vocab_size"]) == (0, 0, n + 2)
    train(run, desk.folder / "tuned")
    assert load_trained(desk.folder / "tuned", "last").tokenizer.eot == n + 1


def test_what_is_no_origin_is_refused(first: Path, desk: Desk) -> None:
    for source in (desk.folder, desk.folder / "nowhere", desk.text):
        path = desk.config(source, model={"n_layer": 1}, tokenizer={"kind": "byte"})
        with pytest.raises(ConfigError, match="init_from"):
            train(load_run([str(path)]), desk.folder / "out")
    assert origin.inherited_sections(str(desk.folder)) == {}
    assert not (desk.folder / "out").exists()


def test_an_imported_run_is_used_and_says_what_it_lacks(first: Path, desk: Desk) -> None:
    imported = str(sources(first)["imported"])
    ask = CliRunner().invoke

    def lines(*arguments: str) -> tuple[int, str]:
        result = ask(app, list(arguments))
        return result.exit_code, result.output

    code, text = lines("generate", "--run", imported, "--prompt", "The", "--max-new-tokens", "5")
    assert (code, text[:3]) == (0, "The")
    result = ask(app, ["eval", "--run", imported, "--split", str(desk.text), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["step"]) == (0, 0)
    code, text = lines("eval", "--run", imported)
    assert code == 2
    assert "give --split FILE" in text
    code, text = lines("train", "--resume", imported)
    assert code == 2
    assert "data.source: required" in text
    assert "train.max_steps: give exactly one" in text
    code, text = lines("report", imported)
    assert code in (0, 2), text
    assert "Traceback" not in text
    code, text = lines("import", str(desk.text))
    assert code == 2
    code, text = lines("export", "--run", imported, "--out", str(desk.folder / "hf"))
    assert code == 2
    assert "is there already" in text


def test_a_study_varies_runs_of_the_model_that_its_base_begins_from(
    first: Path, desk: Desk
) -> None:
    base = desk.config(first)
    path = desk.folder / "study.yaml"
    plain = {"base": str(base), "axes": {"dropout.rate": [0.0, 0.3]}, "seeds": [1]}
    path.write_text(yaml.safe_dump(plain))
    before = load_trained(first, "last")
    for job in load_study(path).jobs:
        assert job.run.model == before.run.model
        assert job.run.tokenizer == before.run.tokenizer


def test_a_config_made_for_a_text_keeps_the_model_that_it_begins_from(
    first: Path, desk: Desk
) -> None:
    values = [f"init_from={first}", f"data.cache_dir={desk.folder / 'cache'}", "device=cpu"]
    run, *_ = recipe.make_recipe(
        [str(desk.text)], 0.1, [*values, "train.max_steps=3", "optim.warmup_steps=0"]
    )
    before = load_trained(first, "last")
    assert run.model == before.run.model
    assert run.tokenizer.kind == "bpe"

"""`gptlite import`: a model made elsewhere → a run directory, which every command then takes.

From a Hugging Face directory or the Hub (the families of interchange/families.py), or a checkpoint
of nanoGPT.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptlite import storage
from gptlite.config.reader import dump, validate
from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.device import use_threads
from gptlite.core.model import GPT
from gptlite.core.weights import FILES, fill, model_tensors
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import CheckpointError, ConfigError, StorageError
from gptlite.interchange import foreign_tokenizer, hf, hf_config, nanogpt
from gptlite.interchange.families import FAMILIES
from gptlite.keys import key
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import RunState
from gptlite.runs.directory import (
    RUNS,
    create_directory,
    describe_environment,
    has_run,
    hold_directory,
)
from gptlite.runs.origin import tokenizer_section
from gptlite.runs.trained import Trained, write_tokenizer
from gptlite.terminal import is_watched, tell

TORCH_FILES = (".pt", ".pth", ".ckpt")
HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model*.safetensors*",
]


class Foreign(NamedTuple):
    """A model made elsewhere, in our words."""

    sections: dict[str, Any]
    """`model` and `dropout`, as in YAML."""
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]
    unseen: tuple[int, ...] = ()


def import_model(source: str, out: Path | None, meta: Path | None) -> Path:
    """Write the run directory and return it. Raises ConfigError, CheckpointError, StorageError."""
    path = Path(source)
    directory = out or RUNS / re.sub(r"[^A-Za-z0-9._-]", "_", path.name or "imported")
    if has_run(path) and not (path / "config.json").is_file():
        raise ConfigError(f"{source}: is a run already; give it to --run")
    storage.require_folder("--out", directory)
    if has_run(directory):
        raise ConfigError(f"--out {directory}: contains a run; give another directory")
    if path.suffix in TORCH_FILES:
        foreign = convert_nanogpt(path, meta)
    elif path.is_dir():
        foreign = convert_folder(path)
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ConfigError(
            f"{source}: expected a Hugging Face directory, a name on its Hub, or nanoGPT's ckpt.pt"
        )
    else:
        foreign = convert_folder(download_model(HUB_NAMES.get(source, source)))
    write_run(foreign, directory, source)
    return directory


def convert_folder(folder: Path) -> Foreign:
    """A directory of Hugging Face's; the Hub's own are links to files named by their content."""
    config = hf_config.read_config(folder)
    sections = hf_config.run_sections(config, str(folder / "config.json"))
    tokenizer = foreign_tokenizer.import_tokenizer(folder)
    if tokenizer.marks.begin != tokenizer.eot:  # as changed elsewhere, whatever we noted
        sections.pop("data", None)
    model = make_run_config(sections, tokenizer).model
    with name_source(folder):
        family = FAMILIES[config["model_type"]]
        tensors = hf.import_tensors(model, family, hf.read_folder(folder))
        vocab_size = hf_config.with_defaults(config)["vocab_size"]
        context = model.context_length
        check_rows(tensors, "config.json", vocab_size=vocab_size, n_positions=context)
    if not model.bias and model.norm == "layernorm":
        bare = hf.without_biases(tensors)
        if bare is None:  # trained on elsewhere: they are no longer zero
            sections["model"] = {**sections["model"], "bias": True}
            tensors = hf.with_all_biases(tensors)
        tensors = tensors if bare is None else bare
    tensors = crop_vocabulary(tensors, tokenizer.vocab_size, folder)
    unseen = hf_config.read_suppressed(folder, tokenizer.vocab_size)
    return Foreign(sections, tokenizer, tensors, unseen)


def convert_nanogpt(path: Path, meta: Path | None) -> Foreign:
    sections, vocab_size, tokenizer, tensors = nanogpt.read_checkpoint(path, meta)
    model = make_run_config(sections, tokenizer).model
    with name_source(path):
        ours = hf.import_tensors(model, FAMILIES["gpt2"], tensors, transposed=False)
        context = model.context_length
        check_rows(ours, "model_args", vocab_size=vocab_size, block_size=context)
    return Foreign(sections, tokenizer, crop_vocabulary(ours, tokenizer.vocab_size, path))


@contextmanager
def name_source(source: Path) -> Iterator[None]:
    """Problems of the weights with the name of where they are."""
    try:
        yield
    except CheckpointError as error:
        where = "" if str(source) in str(error) else f"{source}: "
        raise CheckpointError(*(where + problem for problem in error.problems)) from None


def check_rows(tensors: dict[str, Tensor], place: str, **said: int) -> None:
    """Raises CheckpointError where a table has more or fewer rows than is said, by field."""
    tokens, positions = said.items()
    tables = {"token_embedding": tokens, "head": tokens, "position_embedding": positions}
    for name, (field, size) in tables.items():
        rows = len(tensors.get(f"{name}.weight", range(size)))
        if rows != size:
            raise CheckpointError(f"{name}.weight: {rows} rows, but {field} of {place} is {size}")


def crop_vocabulary(tensors: dict[str, Tensor], vocab_size: int, source: Path) -> dict[str, Tensor]:
    """The tensors without rows for padding of the vocabulary, which no text ever has."""
    for name in ("token_embedding.weight", "head.weight"):
        rows = len(tensors.get(name, range(vocab_size)))
        if rows < vocab_size:
            raise CheckpointError(f"{source}: {rows} embeddings for {vocab_size} tokens")
        if rows > vocab_size:
            tell(
                f"{source}: {name}: {rows - vocab_size} of {rows} rows left out, of which the "
                f"tokenizer has no token (it has {vocab_size})"
            )
            tensors[name] = tensors[name][:vocab_size].contiguous()
    return tensors


def download_model(name: str) -> Path:
    """The folder of a model on Hugging Face's Hub, downloaded once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_watched(sys.stderr):
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # noqa: BLE001 - theirs are of many kinds, and none is ours
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise ConfigError(
            f"{name}: cannot be had from the Hub ({type(error).__name__}: {why}); download its "
            "config.json, tokenizer.json and model.safetensors elsewhere and import that folder"
        ) from None


def make_run_config(sections: dict[str, Any], tokenizer: Tokenizer) -> RunConfig:
    """The config of the run: the model as it came, to be trained on only with data of one's own."""
    values = {
        **sections,
        "tokenizer": tokenizer_section(tokenizer),
        "dtype": "float32",
        "attention": "fused",
    }
    return validate(Document(values), to_train=False)


def open_foreign(folder: Path) -> Trained:
    """The model of a directory of Hugging Face's, as it is, without a run directory.

    Raises ConfigError, CheckpointError.
    """
    return make_trained(convert_folder(folder), str(folder))


def make_trained(foreign: Foreign, source: str) -> Trained:
    """The model in our words, as if it had been trained here."""
    run, text = make_run_config(foreign.sections, foreign.tokenizer), foreign.tokenizer
    use_threads(run)
    model = GPT(run.model, text.vocab_size)
    fill(model, foreign.tensors, source)
    state = RunState(
        step=0,
        run_id=f"{key(dump(run), source):016x}",
        tokens=0,
        elapsed_seconds=0.0,
        best=None,
        val_loss=None,
        evaluations_without_gain=0,
        skipped=[],
        pending=None,
        data_digest="",
        tokenizer_sha256=tokenizers.digest(text),
        config=run.model_dump(mode="json"),
        environment={"imported": source},
    )
    return Trained(
        run,
        model.eval(),
        text,
        step=0,
        trained_length=None,
        unseen=foreign.unseen,
        state=state,
        problems=[],
        notes=[],
    )


def write_run(foreign: Foreign, directory: Path, source: str) -> None:
    """config.yaml last: until then the directory is no run."""
    made = make_trained(foreign, source)
    create_directory(directory)
    try:
        with hold_directory(directory):
            storage.write_json(directory / "env.json", describe_environment())
            write_tokenizer(directory, made.tokenizer, made.unseen)
            checkpoint.save(directory, {FILES[0]: model_tensors(made.model)}, made.state)
            for name in ("best", "last"):
                checkpoint.write_pointer(directory, name, 0)
            storage.write_text(directory / "config.yaml", dump(made.run))
    except OSError as error:
        raise StorageError(f"--out {directory}: {error.strerror}") from None

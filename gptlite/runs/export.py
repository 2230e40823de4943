"""`gptlite export`: a run as a directory that other tools load, with no code of ours.

--to hf    model.safetensors  config.json  generation_config.json  tokenizer.json
           tokenizer_config.json  README.md
--to gguf  model.gguf  Modelfile  README.md

README.md is a model card: data, config, metrics.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from gptlite import __version__, storage
from gptlite.config.reader import dump
from gptlite.config.run import SampleConfig
from gptlite.core.generate import first_token
from gptlite.core.weights import model_tensors
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError, StorageError
from gptlite.interchange import gguf_file, gguf_tokenizer, hf, hf_config, hf_tokenizer
from gptlite.interchange.families import FAMILIES
from gptlite.runs.trained import Trained
from gptlite.terminal import is_watched

GGUF = "model.gguf"


class Export(NamedTuple):
    """A directory that can be written."""

    card: str
    note: str
    """What the other side has no word for; empty where it has one for all."""
    files: dict[str, Any]
    """JSON or text, by name."""
    tensor_file: str
    write_tensors: Callable[[Path], None]


def prepare_hf(trained: Trained) -> Export:
    """For Hugging Face's tools. Raises ConfigError if the model has no equivalent there."""
    run, text = trained.run, trained.tokenizer
    family = hf_config.family_of(run.model)
    begin = first_token(text, run.data.layout == "documents")
    ends = {"eos_token_id": end_ids(text), "bos_token_id": text.eot if begin is None else begin}
    suppressed = {"suppress_tokens": list(trained.unseen)} if trained.unseen else {}
    config = hf_config.make_config(run.model, run.dropout, text.vocab_size, run.data.layout)
    files: dict[str, Any] = {
        "config.json": config | ends,
        "generation_config.json": ends | {"pad_token_id": text.eot} | suppressed,
        **hf_tokenizer.make_files(text, run.model.context_length, begin),
    }
    tensors = hf.export_tensors(run.model, FAMILIES[family], model_tensors(trained.model.cpu()))
    lost = hf_config.lost_sites(run.dropout, family)
    card = model_card(trained, "transformers", HF_USE, lost)
    save = partial(save_file, tensors, metadata={"format": "pt"})
    note = f"config.json has no word for this dropout: {', '.join(lost)}" if lost else ""
    return Export(card, note, files, hf.WEIGHTS, save)


def prepare_gguf(trained: Trained, type_: str, name: str) -> Export:
    """One file for llama.cpp, and how Ollama takes it. Raises ConfigError if llama.cpp cannot hold
    the model, its tokenizer, or its weights as numbers of that type."""
    run, text = trained.run, trained.tokenizer
    gguf_file.package()
    tensors = gguf_file.make_tensors(run.model, model_tensors(trained.model.cpu()))
    gguf_file.check_numbers(tensors, type_)
    vocabulary = gguf_tokenizer.make_vocabulary(text)
    begin = first_token(text, run.data.layout == "documents")
    tokens = gguf_tokenizer.vocabulary_fields(vocabulary, begin)
    tokens["suppress_tokens"] = list(trained.unseen)
    sampling = gguf_file.sampling_fields(run.sample)
    fields = {
        "general.name": name,
        "general.description": f"Trained and exported by gptlite {__version__}",
        "general.size_label": f"{run.model.n_parameters(text.vocab_size) / 1e6:.3g}M",
        "gptlite.config": dump(run),
        **{f"general.sampling.{name}": value for name, value in sampling.items()},
        **{f"tokenizer.ggml.{name}": value for name, value in tokens.items()},
    }
    files = {"Modelfile": modelfile(run.sample, run.model.context_length)}
    lost = vocabulary.ends[len(gguf_tokenizer.ENDS) :]
    note = f"llama.cpp will not stop at the tokens {lost}: it has a word for three" if lost else ""
    write = partial(gguf_file.write, model=run.model, tensors=tensors, type_=type_, fields=fields)
    return Export(model_card(trained, "gguf", GGUF_USE, []), note, files, GGUF, write)


def save(export: Export, out: Path) -> None:
    """The directory, whole or not at all. Raises ConfigError if `out` is not free, StorageError."""
    with new_folder(out) as work:
        for name, value in export.files.items():
            write = storage.write_text if isinstance(value, str) else storage.write_json
            write(work / name, value)
        storage.write_text(work / "README.md", export.card)
        export.write_tensors(work / export.tensor_file)
        storage.disk.sync(work / export.tensor_file)


def require_hub_name(name: str) -> None:
    """Raises ConfigError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push {name}: {error}") from None


def push(folder: Path, name: str) -> str:
    """The address of the directory on Hugging Face's Hub. Raises ConfigError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_watched(sys.stderr):
        disable_progress_bars()
    try:
        hub = HfApi(library_name="gptlite")
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # noqa: BLE001 - theirs are of many kinds, and none is ours
        why = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        raise ConfigError(
            f"--push {name}: {type(error).__name__}: {why}; the directory is written: log in with "
            f"`hf auth login`, then `hf upload {name} {folder}`"
        ) from None
    return f"https://huggingface.co/{name}"


def require_free(out: Path) -> None:
    """Raises ConfigError if a directory cannot be made there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already; give a new directory")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is `out` only once all of it is written."""
    require_free(out)
    work = storage.temporary_path(out)
    try:
        storage.make_folders(work)
        yield work
        if out.exists():
            storage.disk.delete_folder(out)
        storage.disk.rename(work, out)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out}: not below a directory") from None
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}") from None
    finally:
        storage.discard(work)


def end_ids(text: Tokenizer) -> int | list[int] | None:
    """Where generation stops, as config.json has it."""
    ends = [text.eot, *text.marks.ends] if text.eot is not None else [*text.marks.ends]
    return ends if len(ends) > 1 else next(iter(ends), None)


def modelfile(sample: SampleConfig, context_length: int) -> str:
    """How Ollama runs the file: plain continuation, sampled as the run samples."""
    named = gguf_file.sampling_fields(sample)
    parameters = {
        "num_ctx": context_length,
        "num_predict": sample.max_new_tokens,
        "temperature": named["temp"],
        **{name: named[name] for name in ("top_k", "top_p", "min_p")},
        "repeat_penalty": named["penalty_repeat"],
        "repeat_last_n": named["penalty_last_n"],
    }
    lines = [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join([f"FROM ./{GGUF}", 'TEMPLATE "{{ .Prompt }}"', *lines, ""])


def model_card(trained: Trained, library: str, use: str, lost: list[str]) -> str:
    """README.md of the directory."""
    run, state = trained.run, trained.state
    n_parameters = run.model.n_parameters(trained.tokenizer.vocab_size)
    facts = {
        "parameters": f"{n_parameters:,}",
        "updates": f"{state.step:,}",
        "tokens seen": f"{state.tokens:,}",
        "data": ", ".join(run.sources) or "not known to gptlite",
        "sha256 of the token files": state.data_digest or "none",
        "tokenizer": f"{trained.tokenizer.kind}, {trained.tokenizer.vocab_size:,} tokens",
    }
    if state.best is not None:
        at = f"validation loss (nats per token, dropout off, step {state.best.step})"
        facts[at] = f"{state.best.val_loss:.4f}"
        if state.best.val_bits_per_byte is not None:
            facts["validation bits per byte"] = f"{state.best.val_bits_per_byte:.4f}"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    not_said = f"\nTrained with dropout that config.json has no word for: {', '.join(lost)}.\n"
    return CARD.format(
        **{"library": library, "version": __version__, "use": use, "table": table},
        **{"lost": not_said if lost else "", "config": dump(run)},
    )


HF_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```"""
GGUF_USE = """```
llama-completion -m model.gguf -no-cnv -p "It was"
ollama create mine -f Modelfile && ollama run mine "It was"
```"""
CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags: [gptlite]
---

# A small GPT

Trained and exported by gptlite {version}.

{use}

| | |
|---|---|
{table}
{lost}
The whole config:

```yaml
{config}```
"""

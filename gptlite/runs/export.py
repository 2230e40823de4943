"""`gptlite export`: a run as a directory that Hugging Face's tools load, with no code of ours.

model.safetensors  config.json  generation_config.json  tokenizer.json  tokenizer_config.json
README.md          a model card: data, config, metrics
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gptlite import __version__, storage
from gptlite.config.reader import dump
from gptlite.core.generate import first_token
from gptlite.core.weights import model_tensors
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError, StorageError
from gptlite.interchange import hf, hf_config, hf_tokenizer
from gptlite.runs.trained import Trained


def export_model(trained: Trained, out: Path) -> list[str]:
    """Write the directory, whole or not at all; returns what Hugging Face has no word for.

    Raises ConfigError if the model has no equivalent there, or `out` is not free.
    """
    run, text = trained.run, trained.tokenizer
    family = hf_config.family_of(run.model)
    begin = first_token(text, run.data.layout == "documents")
    ends = {"eos_token_id": end_ids(text), "bos_token_id": text.eot if begin is None else begin}
    config = hf_config.make_config(run.model, run.dropout, text.vocab_size, run.data.layout)
    files: dict[str, Any] = {
        "config.json": config | ends,
        "generation_config.json": ends | {"pad_token_id": text.eot},
        **hf_tokenizer.make_files(text, run.model.context_length, begin),
    }
    tensors = hf.export_tensors(run.model, family, model_tensors(trained.model.cpu()))
    lost = hf_config.lost_sites(run.dropout, family)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already; give a new directory")
    work = storage.temporary_path(out)
    try:
        storage.make_folders(work)
        for name, value in files.items():
            storage.write_json(work / name, value)
        storage.write_text(work / "README.md", model_card(trained, lost))
        save_file(tensors, work / hf.WEIGHTS, metadata={"format": "pt"})
        storage.disk.sync(work / hf.WEIGHTS)
        if out.exists():
            storage.disk.delete_folder(out)
        storage.disk.rename(work, out)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--out {out}: not below a directory") from None
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}") from None
    finally:
        storage.discard(work)
    return lost


def end_ids(text: Tokenizer) -> int | list[int] | None:
    """Where generation stops, as config.json has it."""
    ends = [text.eot, *text.marks.ends] if text.eot is not None else [*text.marks.ends]
    return ends if len(ends) > 1 else next(iter(ends), None)


def model_card(trained: Trained, lost: list[str]) -> str:
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
        version=__version__, table=table, lost=not_said if lost else "", config=dump(run)
    )


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gptlite]
---

# A small GPT

Trained and exported by gptlite {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

| | |
|---|---|
{table}
{lost}
The whole config:

```yaml
{config}```
"""

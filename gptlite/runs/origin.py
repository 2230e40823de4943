"""What `init_from` names: a run, a checkpoint of one, or a Hugging Face directory. No torch.

A run that begins there has its model and its tokenizer; only data, dropout and training are new.
"""

import os
from pathlib import Path
from typing import Any

from gptlite.config import strict_yaml
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError
from gptlite.interchange import foreign_tokenizer, hf_config


def run_of(source: str) -> Path | None:
    """The run directory that is meant, itself or by a checkpoint in it."""
    path = Path(source)
    for directory in (path, path.parent.parent):
        if os.path.isfile(directory / "config.yaml"):
            return directory
    return None


def is_hugging_face(source: str) -> bool:
    return run_of(source) is None and os.path.isfile(Path(source) / "config.json")


def sections(source: str) -> dict[str, dict[str, Any]]:
    """`model` and `tokenizer` as in YAML, if something is there. Raises ConfigError, DataError."""
    if directory := run_of(source):
        stored = strict_yaml.read(directory / "config.yaml").values
        return {name: stored.get(name) or {} for name in ("model", "tokenizer")}
    if not is_hugging_face(source):
        return {}
    model = hf_config.sections(hf_config.read(Path(source)), f"{source}/config.json")["model"]
    return {"model": model, "tokenizer": section_of(foreign_tokenizer.read(Path(source)))}


def tokenizer_of(source: str) -> Tokenizer:
    """Raises ConfigError, DataError."""
    if directory := run_of(source):
        return tokenizers.read(directory / "tokenizer" / "tokenizer.json")
    if not is_hugging_face(source):
        raise ConfigError(
            f"init_from: {source}: not a run, a checkpoint of one, or a Hugging Face directory; "
            "files that hold pickles, such as .pt and .pth, are never loaded"
        )
    return foreign_tokenizer.read(Path(source))


def section_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The section of a config that describes a tokenizer."""
    names = {"bpe": "vocab_size", "tiktoken": "name", "char": "unknown"}
    name = names.get(tokenizer.kind)
    return {"kind": tokenizer.kind, **({} if name is None else {name: getattr(tokenizer, name)})}

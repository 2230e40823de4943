"""Configs read whole, with what `init_from` names: a run, a checkpoint of one, or a Hugging Face
directory. No torch.

A run that begins there has its model and its tokenizer; only data, dropout and training are new.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlite.config import strict_yaml
from gptlite.config.reader import read_layers, validate
from gptlite.config.run import ModelConfig, RunConfig
from gptlite.config.strict_yaml import Document, Path_, problem_line
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError
from gptlite.interchange import foreign_tokenizer, hf_config
from gptlite.runs.directory import has_run

MAY_DIFFER = {("model", "context_length")}
"""What a run may have another value of than the one that it begins from."""


def load_run(
    files: Sequence[str], overrides: Sequence[str] = (), *, to_train: bool = True
) -> RunConfig:
    """The run that the files and overrides describe; one that is only used needs no data.

    Raises ConfigError with one line per problem: `run.yaml:4:5: optim.lr: must be ...`.
    """
    return complete_run(read_layers(files, overrides), to_train=to_train)


def complete_run(document: Document, *, to_train: bool = True) -> RunConfig:
    """The run that a document describes, with model and tokenizer of what `init_from` names.

    Every config is read through here. Raises ConfigError.
    """
    inherit(document)
    return validate(document, to_train=to_train)


def inherit(document: Document) -> None:
    """Model and tokenizer are those of what `init_from` names; a config may leave them out."""
    source = document.value(("init_from",))
    if not isinstance(source, str) or "\0" in source or has_whole_model(document):
        return
    for section, values in inherited_sections(source).items():
        asked = document.values.setdefault(section, {})
        if not isinstance(asked, dict):
            continue
        for key, value in values.items():
            path: Path_ = (section, key)
            if key not in asked:
                asked[key] = value
                document.places[path] = f"init_from {source}"
            elif asked[key] != value and path not in MAY_DIFFER:
                place, has = document.places.get(path, "config"), f"init_from {source} has {value}"
                why = f"is {asked[key]}, but {has}; leave it out"
                document.problems.append(problem_line(place, path, why))
                document.refused.add(path)


def has_whole_model(document: Document) -> bool:
    """Whether every key of the model is given, as in the stored config of a run."""
    given = document.values.get("model")
    return isinstance(given, dict) and set(given) >= set(ModelConfig.model_fields)


def find_run(source: str) -> Path | None:
    """The run directory that is meant, itself or by a checkpoint in it."""
    path = Path(source)
    for directory in (path, path.parent.parent):
        if has_run(directory):
            return directory
    return None


def is_hugging_face(source: str) -> bool:
    return find_run(source) is None and os.path.isfile(Path(source) / "config.json")


def inherited_sections(source: str) -> dict[str, dict[str, Any]]:
    """`model` and `tokenizer` as in YAML, if something is there. Raises ConfigError, DataError."""
    if directory := find_run(source):
        stored = strict_yaml.read_yaml(directory / "config.yaml").values
        return {name: stored.get(name) or {} for name in ("model", "tokenizer")}
    if not is_hugging_face(source):
        return {}
    config = hf_config.read_config(Path(source))
    model = hf_config.run_sections(config, f"{source}/config.json")["model"]
    tokenizer = foreign_tokenizer.import_tokenizer(Path(source))
    return {"model": model, "tokenizer": tokenizer_section(tokenizer)}


def given_tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer that a run is given by what it begins from. Raises ConfigError, DataError."""
    source = run.init_from
    if source is None:
        return None
    if directory := find_run(source):
        return tokenizers.read_tokenizer(directory / "tokenizer" / "tokenizer.json")
    if not is_hugging_face(source):
        raise ConfigError(
            f"init_from: {source}: not a run, a checkpoint of one, or a Hugging Face directory; "
            "files that hold pickles, such as .pt and .pth, are never loaded"
        )
    return foreign_tokenizer.import_tokenizer(Path(source))


def tokenizer_section(tokenizer: Tokenizer) -> dict[str, Any]:
    """The section of a config that describes a tokenizer."""
    names = {"bpe": "vocab_size", "tiktoken": "name", "char": "unknown"}
    name = names.get(tokenizer.kind)
    return {"kind": tokenizer.kind, **({} if name is None else {name: getattr(tokenizer, name)})}

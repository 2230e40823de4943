"""The trained models that a run learns from, beside its text (`distill.teachers`)."""

from pathlib import Path
from typing import NamedTuple

from gptlite.config.run import RunConfig
from gptlite.core.ensemble import Ensemble
from gptlite.core.tensor_files import is_part
from gptlite.core.weights import FILES
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError
from gptlite.runs.trained import Trained, load_trained


class Teachers(NamedTuple):
    model: Ensemble | None
    """The mean of their probabilities; None: there are none."""
    digests: dict[str, str]
    """sha256 of the weights of each, by its place."""


def load_teachers(run: RunConfig, text: Tokenizer) -> Teachers:
    """The best checkpoint of each, verified and frozen. Raises ConfigError, CheckpointError."""
    found, digests = [], {}
    for source in run.distill.teachers:
        if not (Path(source) / "config.yaml").is_file():
            raise ConfigError(f"distill.teachers: {source}: not a run directory")
        teacher = load_trained(Path(source), "best")
        check_teacher(source, teacher, run, text)
        teacher.model.requires_grad_(False)
        found.append(teacher.model)
        digests[source] = weights_digest(teacher)
    return Teachers(Ensemble(found, "probabilities").eval() if found else None, digests)


def weights_digest(teacher: Trained) -> str:
    files = teacher.state.files
    return "-".join(files[name] for name in sorted(files) if is_part(name, FILES[0]))


def check_teacher(source: str, teacher: Trained, run: RunConfig, text: Tokenizer) -> None:
    """Raises ConfigError where a teacher could not read what the run reads."""
    at = f"distill.teachers: {source}"
    if tokenizers.digest(teacher.tokenizer) != tokenizers.digest(text):
        raise ConfigError(f"{at}: has another tokenizer than this run, whose tokens it cannot read")
    if teacher.context_length < run.model.context_length:
        raise ConfigError(
            f"{at}: reads {teacher.context_length} tokens, this run {run.model.context_length} "
            "(model.context_length)"
        )
    if teacher.run.data.layout != run.data.layout:
        raise ConfigError(
            f"{at}: was trained on data.layout {teacher.run.data.layout}, not {run.data.layout}"
        )

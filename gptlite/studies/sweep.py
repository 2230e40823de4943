"""`gptlite study --config F --sweep KEY=V,V`: a study from options, kept as the file of one.

    studies/NAME.yaml   what the options say; the file can be edited and given to `gptlite study`
    studies/NAME/       the study itself

The file stands beside the folder because a study has the name of its file: the same options and the
file alone both go on with the same runs.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gptlite import storage
from gptlite.config import strict_yaml
from gptlite.config.reader import Dumper
from gptlite.config.strict_yaml import Document
from gptlite.errors import ConfigError
from gptlite.studies.config import Study, StudyConfig, make_study, read_study_config, short_names
from gptlite.words import escape_controls

STUDIES = Path("studies")
EXAMPLE = "as in --sweep dropout.rate=0,0.1,0.2"


def make_sweep(
    configs: Sequence[str],
    sweeps: Sequence[str],
    overrides: Sequence[str],
    n_seeds: int,
    folder: Path | None,
) -> Study:
    """The study that the options describe, with the name of its folder, or one of its own.

    Raises ConfigError with all problems, each at its option.
    """
    values: dict[str, Any] = {"base": configs[0] if len(configs) == 1 else list(configs)}
    document = Document(values)
    read_options(document, "set", "--set", overrides)
    read_options(document, "axes", "--sweep", sweeps)
    values["seeds"] = list(range(1, n_seeds + 1))
    if document.problems:
        raise ConfigError(*document.problems)
    name = sweep_name(configs, values["axes"]) if folder is None else folder.resolve().name
    return make_study(name, document)


def read_options(document: Document, section: str, option: str, texts: Sequence[str]) -> None:
    """Lay what an option says under a section of the study; what is wrong goes to `problems`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        name = f"{option} {key}"
        try:
            if not equals or not all(key.split(".")):
                raise ConfigError(f"{name}: expected {expected(option)}")
            if key in found:
                raise ConfigError(f"{name}: given twice")
            listed = f"[{value}]" if option == "--sweep" and value.strip() else value
            layer = strict_yaml.override([key], listed, name)
        except ConfigError as error:
            document.problems += error.problems
            continue
        found |= layer.values
        document.problems += layer.problems
        document.places |= {(section, *path): name for path in layer.places if path}
        document.key_places[section, key] = name
    if found:
        document.values[section] = found


def expected(option: str) -> str:
    if option == "--set":
        return "key=value, as in --set optim.lr=3e-4"
    return f"key=value,value, {EXAMPLE}"


def sweep_name(configs: Sequence[str], axes: dict[str, Any]) -> str:
    """What is varied, of which config: `quickstart-rate`."""
    parts = [*(Path(config).stem for config in configs), *short_names(axes).values()]
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts))[:80]


def sweep_file(folder: Path) -> Path:
    """Where the file of a study in this folder is."""
    return folder.parent / f"{folder.resolve().name}.yaml"


def study_folder(file: Path) -> Path:
    """Where the study of a file is: beside it if it was begun there, else in studies/."""
    beside = file.with_suffix("")
    return beside if (beside / "study.yaml").is_file() else STUDIES / file.stem


def is_new(path: Path, study: Study) -> bool:
    """Whether the file of a study has to be written: it is not there, or has fewer values or seeds.

    Raises ConfigError if it is another study, which somebody may have written by hand.
    """
    if not path.exists():
        return True
    there = read_study_config(strict_yaml.read_yaml(path))
    if there == study.config or extends(study.config, there):
        return there != study.config
    known = f"run it by `gptlite study {shlex.quote(str(path))}`"
    raise ConfigError(f"{path}: is another study; {known}, or give --out-dir for this one")


def write_sweep(path: Path, study: Study) -> None:
    storage.make_folders(path.parent)
    storage.write_text(path, "\n".join(sweep_lines(study)))


def extends(new: StudyConfig, old: StudyConfig) -> bool:
    """Whether a study only has more values or more seeds than another."""
    grown = {"axes": new.axes, "seeds": new.seeds}
    if old.model_copy(update=grown) != new or list(old.axes) != list(new.axes):
        return False
    values = [
        (value, new.axes[axis])
        for axis, listed in old.axes.items()
        for value in (listed if isinstance(listed, list) else [listed])
    ]
    more = all(isinstance(listed, list) and value in listed for value, listed in values)
    return more and set(old.seeds) <= set(new.seeds)


def sweep_lines(study: Study) -> Iterator[str]:
    """The YAML, which is read back to the same study."""
    axes = ", ".join(short_names(study.axes).values())
    base = study.config.base
    of = base if isinstance(base, str) else ", ".join(base)
    yield escape_controls(f"# {axes} of {of}. Add values, seeds or suites, and run it again:")
    yield "# what is done is not done again."
    yield yaml.dump(
        study.document.values,
        Dumper=Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=1000,
    )

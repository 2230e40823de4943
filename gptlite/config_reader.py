"""YAML files and `--set` → one RunConfig, or every problem at once with its place.

Files merge left to right and `--set` last; each value remembers where it came from. Names from
nanoGPT, Hugging Face, litgpt and the book are refused with ours named.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gptlite import strict_yaml
from gptlite.config import RunConfig, SampleConfig, contradictions
from gptlite.errors import ConfigError
from gptlite.strict_yaml import Document, Path_

FOREIGN = {
    "block_size": "model.context_length",
    "n_positions": "model.context_length",
    "n_ctx": "model.context_length",
    "max_seq_len": "model.context_length",
    "emb_dim": "model.n_embd",
    "d_model": "model.n_embd",
    "hidden_size": "model.n_embd",
    "n_layers": "model.n_layer",
    "num_hidden_layers": "model.n_layer",
    "n_heads": "model.n_head",
    "num_attention_heads": "model.n_head",
    "num_key_value_heads": "model.n_kv_head",
    "qkv_bias": "model.bias",
    "drop_rate": "dropout.rate",
    "dropout_rate": "dropout.rate",
    "embd_pdrop": "dropout.sites.embedding",
    "emb_dropout": "dropout.sites.embedding",
    "drop_rate_emb": "dropout.sites.embedding",
    "attn_pdrop": "dropout.sites.attention_weights",
    "attn_dropout": "dropout.sites.attention_weights",
    "attention_dropout": "dropout.sites.attention_weights",
    "drop_rate_attn": "dropout.sites.attention_weights",
    "resid_pdrop": "dropout.sites.attention_output and dropout.sites.mlp_output",
    "residual_dropout": "dropout.sites.attention_output and dropout.sites.mlp_output",
    "hidden_dropout": "dropout.sites.attention_output and dropout.sites.mlp_output",
    "drop_rate_shortcut": "dropout.sites.attention_output and dropout.sites.mlp_output",
    "activation_dropout": "dropout.sites.mlp_activation",
    "ff_dropout": "dropout.sites.mlp_activation",
    "relu_dropout": "dropout.sites.mlp_activation",
    "learning_rate": "optim.lr",
    "warmup_iters": "optim.warmup_steps",
    "lr_warmup_steps": "optim.warmup_steps",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "max_norm": "optim.grad_clip",
    "max_grad_norm": "optim.grad_clip",
    "max_iters": "train.max_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "global_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size (sequences per update) and micro_batch_size",
    "eval_freq": "train.eval_interval",
    "eval_iters": "train.eval_batches",
    "dataset": "data.source",
}
# Setting one of these in a later layer takes back the other of an earlier one.
REPLACES = {
    ("train", "epochs"): ("train", "max_steps"),
    ("train", "max_steps"): ("train", "epochs"),
    ("data", "source"): ("data", "sha256"),
}


def shipped_configs() -> Path:
    """The folder of shipped configs: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find(name: str) -> Path:
    """A file, or the name of a shipped config."""
    path = Path(name)
    if path.suffix or path.exists() or path.parent != Path():
        return path
    shipped = {file.stem: file for file in sorted(shipped_configs().glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"shipped configs: {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such file, and no shipped config of that name; {hint}")


def read_layers(files: Sequence[str], overrides: Sequence[str]) -> Document:
    """One document of all layers, later ones winning."""
    merged = Document({})
    problems: list[str] = []
    for file in files:
        try:
            merge(merged, strict_yaml.read(find(file)))
        except ConfigError as error:
            problems += error.problems
    seen: set[str] = set()
    for override in overrides:
        try:
            layer = override_layer(override, seen)
        except ConfigError as error:
            problems += error.problems
        else:
            merge(merged, layer)
    if problems:
        raise ConfigError(*problems)
    return merged


def override_layer(override: str, seen: set[str]) -> Document:
    key, equals, text = override.partition("=")
    key = key.strip()
    name = f"--set {key}"
    if not equals:
        raise ConfigError(f"--set {override}: expected key=value, as in --set optim.lr=3e-4")
    if not key or not all(key.split(".")):
        raise ConfigError(f"--set {override}: no key before '='")
    if key in seen:
        raise ConfigError(f"{name}: given twice")
    seen.add(key)
    path = tuple(key.split("."))
    values: Any = strict_yaml.scalar(text, name)
    layer = Document(values, {path: name}, {path: name})
    if text.strip()[0] in "\"'":
        layer.quoted.add(path)
    for part in reversed(path):
        layer.values = {part: layer.values}
    for end in range(1, len(path)):
        layer.places[path[:end]] = layer.key_places[path[:end]] = name
    return layer


def merge(into: Document, layer: Document) -> None:
    """Lay one layer over what is there; its places go with its values."""
    for path, other in REPLACES.items():
        if value_at(layer.values, path) is not None and value_at(layer.values, other) is None:
            section = into.values.get(other[0])
            if isinstance(section, dict):
                section.pop(other[1], None)

    def lay(target: dict[str, Any], values: dict[str, Any], at: Path_) -> None:
        for key, value in values.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                lay(target[key], value, path)
            else:
                target[key] = value
                into.quoted -= {path}

    lay(into.values, layer.values, ())
    into.places |= layer.places
    into.key_places |= layer.key_places
    into.quoted |= layer.quoted


def sample_options(run_dir: Path, given: dict[str, Any]) -> SampleConfig:
    """The sampling options of a run with those of the command line laid over them.

    Raises ConfigError naming the options that are out of range.
    """
    stored = load_run([str(run_dir / "config.yaml")]).sample
    laid = {name: value for name, value in given.items() if value is not None}
    try:
        return SampleConfig.model_validate({**stored.model_dump(), **laid})
    except ValidationError as error:
        schema, document = SampleConfig.model_json_schema(), Document(laid)
        names = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        options = {name: "--" + name.replace("_", "-") for name in names}
        words = {name: explain((name,), "", document, schema) for name in names}
        raise ConfigError(*(f"{options[name]}: {words[name]}" for name in names)) from None


def value_at(values: Any, path: Path_) -> Any:
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return None
    return values


def load_run(files: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the files and overrides describe.

    Raises ConfigError with one line per problem: `run.yaml:4:5: optim.lr: must be ...`.
    """
    return validate(read_layers(files, overrides))


def validate(document: Document) -> RunConfig:
    problems: dict[Path_, str] = {}
    try:
        run = RunConfig.model_validate(document.values)
    except ValidationError as error:
        schema = RunConfig.model_json_schema()
        for detail in error.errors(include_url=False):
            path = trimmed(detail["loc"], document.values)
            problems.setdefault(path, explain(path, detail["type"], document, schema))
        try:  # what is left may contradict itself too, and the user wants to hear all of it
            run = RunConfig.model_validate(without(document.values, problems))
        except ValidationError:
            raise ConfigError(*located(problems, document)) from None
    for key, message in contradictions(run):
        path = tuple(key.split("."))
        if not any(path[: len(known)] == known for known in problems):
            problems.setdefault(path, message)
    if problems:
        raise ConfigError(*located(problems, document))
    return run


def trimmed(loc: tuple[int | str, ...], values: Any) -> Path_:
    """The part of a validator's location that names keys, without its marks for union branches."""
    path: Path_ = ()
    for part in loc:
        inside = isinstance(values, dict) and part in values
        if not inside:
            inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not inside:
            break
        values, path = values[part], (*path, part)
    return path


def without(values: dict[str, Any], problems: dict[Path_, str]) -> dict[str, Any]:
    """A copy without the values that have a problem; a bad list goes whole."""

    def kept(part: Any, at: Path_) -> Any:
        if not isinstance(part, dict):
            return part
        bad = {path[: len(at) + 1] for path in problems if len(path) <= len(at) + 1}
        bad |= {path[: len(at) + 1] for path in problems if isinstance(path[-1], int)}
        return {k: kept(v, (*at, k)) for k, v in part.items() if (*at, k) not in bad}

    result: dict[str, Any] = kept(values, ())
    return result


def located(problems: dict[Path_, str], document: Document) -> list[str]:
    """The lines to print, in the order of the files."""

    def place(path: Path_) -> str:
        unknown = problems[path].startswith("unknown key")
        places = document.key_places if unknown else document.places
        while path and path not in places:
            path = path[:-1]
        return places.get(path, "config")

    def order(path: Path_) -> tuple[str, ...]:
        return tuple(part.zfill(6) if part.isdigit() else part for part in place(path).split(":"))

    lines = []
    for path in sorted(problems, key=order):
        dotted = ".".join(map(str, path))
        lines.append(f"{place(path)}: {dotted}: {problems[path]}")
    return lines


def explain(path: Path_, kind: str, document: Document, schema: dict[str, Any]) -> str:
    """What is wrong with the value at `path`, in the words of its field's schema."""
    if kind == "extra_forbidden":
        return unknown_key(path)
    node = schema_at(schema, path)
    value = value_at(document.values, path)
    if value is None:
        return f"is empty; expected {describe(node, schema)}"
    if path in document.quoted and not accepts(node, schema, "string"):
        return f"expected {describe(node, schema)}, got a quoted string"
    bounds = describe_bounds(node, schema) if is_number(value) else ""
    bounds = bounds if math.isfinite(value if bounds else 0) else f"finite and {bounds}"
    integral = accepts(node, schema, "integer") and not accepts(node, schema, "number")
    if bounds and not (integral and isinstance(value, float)):
        far = " (out of range)" if isinstance(value, int) and abs(value) >= 2**63 else ""
        got = f"{value:.3e}" if far else value
        others = [b for b in branches(node, schema) if "enum" in b or "const" in b]
        words = "".join(f", or {describe(b, schema)}" for b in others)
        return f"must be {bounds}{words} (got {got}){far}"
    got = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    got = got if len(got) <= 60 else got[:57] + "..."
    return f"expected {describe(node, schema)}, got {got}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown_key(path: Path_) -> str:
    """Another project's name, a key of another section, or a slip of the pen."""
    known = dict(all_keys())
    key = str(path[-1])
    if key in FOREIGN:
        return f"unknown key '{key}'; gptlite calls it {FOREIGN[key]}"
    siblings = [name.split(".")[-1] for name in known if name.split(".")[:-1] == list(path[:-1])]
    homes = [name.rpartition(".")[0] for name in known if name.split(".")[-1] == key]
    if homes:
        return f"unknown key '{key}' here; it belongs in '{homes[0] or 'the top level'}'"
    near = difflib.get_close_matches(key, siblings, 1)
    if near:
        return f"unknown key '{key}'; did you mean '{near[0]}'?"
    return f"unknown key '{key}'; known here: {', '.join(siblings)}"


def all_keys() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dotted key of a run with its schema node, sections included."""
    schema = RunConfig.model_json_schema()

    def walk(node: dict[str, Any], at: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, child in resolve(node, schema).get("properties", {}).items():
            yield at + name, child
            yield from walk(child, f"{at}{name}.")

    return walk(schema, "")


def resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    target: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return target


def schema_at(schema: dict[str, Any], path: Path_) -> dict[str, Any]:
    node = schema
    for part in path:
        node = resolve(node, schema)
        if isinstance(part, int):
            node = next((b for b in branches(node, schema) if b.get("type") == "array"), {})
            items = node.get("prefixItems", [])
            node = items[part] if part < len(items) else node.get("items", {})
        else:
            node = node.get("properties", {}).get(part, {})
    return node


def branches(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    node = resolve(node, schema)
    return [resolve(option, schema) for option in node.get("anyOf", [node])]


def accepts(node: dict[str, Any], schema: dict[str, Any], kind: str) -> bool:
    """Whether any value of a JSON type will do, not only certain words."""
    free = [branch for branch in branches(node, schema) if not {"enum", "const"} & branch.keys()]
    return any(branch.get("type") == kind for branch in free)


def shown(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2**{power}" if power > 30 and bound == 2**power else f"{bound:g}"


def describe_bounds(node: dict[str, Any], schema: dict[str, Any]) -> str:
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "greater than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
    }
    for branch in branches(node, schema):
        if branch.get("type") in ("integer", "number"):
            return " and ".join(
                text.format(shown(branch[key])) for key, text in words.items() if key in branch
            )
    return ""


def describe(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values a field takes, in words."""
    names = {"boolean": "true or false", "string": "text", "object": "a mapping"}
    parts = []
    for branch in branches(node, schema):
        kind = branch.get("type")
        if "enum" in branch or "const" in branch:
            options = branch.get("enum") or [branch["const"]]
            parts.append(("one of " if len(options) > 1 else "") + ", ".join(options))
        elif kind == "integer":
            positive = branch.get("minimum") == 1
            bounds = "" if positive else " " + describe_bounds(branch, schema)
            parts.append(("a positive integer" if positive else "an integer") + bounds)
        elif kind == "number":
            parts.append(f"a number {describe_bounds(branch, schema)}")
        elif kind == "array":
            items = branch.get("prefixItems") or [branch.get("items", {})]
            n = {2: "two"}.get(len(branch.get("prefixItems", [])), "")
            parts.append(f"a list of {n} {describe(items[0], schema)}".replace("  ", " "))
        elif kind in names:
            pattern = f" of the form {branch['pattern']}" if "pattern" in branch else ""
            parts.append(names[kind] + pattern)
    return " or ".join(parts)


def dump(run: RunConfig) -> str:
    """YAML that loads again to the same values."""
    plain = run.model_dump(mode="json")
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


class Dumper(yaml.SafeDumper):
    """Quotes every text that is not a plain word: YAML 1.1 and 1.2 disagree about the others."""


def represent_text(dumper: Dumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in (
        *strict_yaml.CONSTANTS,
        *("yes", "no", "on", "off", "y", "n"),
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


Dumper.add_representer(str, represent_text)


def origins(document: Document, run: RunConfig) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, where it was set) for every leaf of the run."""

    def walk(part: Any, path: Path_) -> Iterator[tuple[str, Any, str]]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(value, (*path, key))
            return
        given = value_at(document.values, path) is not None
        place = document.places.get(path, "default") if given else "default"
        yield ".".join(map(str, path)), part, place

    return walk(run.model_dump(mode="json"), ())

"""What is wrong with a value, in words: a schema and a place → one line for the user.

The words come from the bounds and choices of the fields, so they cannot disagree with the check.
Names from nanoGPT, Hugging Face, litgpt and the book are answered with ours.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document, Path_, read_scalar
from gptlite.words import did_you_mean

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
    "dropout": "dropout.rate",
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
    "attention_probs_dropout_prob": "dropout.sites.attention_weights",
    "hidden_dropout_prob": "dropout.sites.attention_output and dropout.sites.mlp_output",
    "drop_path": "dropout.sites.layer",
    "stoch_depth": "dropout.sites.layer",
    "layerdrop": "dropout.sites.layer",
    "word_dropout": "dropout.sites.token",
    "symbol_dropout": "dropout.sites.token",
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


def explain(path: Path_, kind: str, document: Document, schema: dict[str, Any]) -> str:
    """What is wrong with the value at `path`, in the words of its field's schema."""
    if kind == "extra_forbidden":
        return unknown_key(path, document, schema) + twice(path, document)
    node = schema_at(schema, path)
    value = document.value(path)
    if value is None:
        return f"is empty; expected {describe(node, schema)}"
    quoted, names = path in document.quoted, words_of(node, schema)
    a_word = quoted and names and isinstance(read_scalar(value), str)
    if quoted and not a_word and not accepts(node, schema, "string"):
        return f"expected {describe(node, schema)}, got a quoted string"
    integral = accepts(node, schema, "integer") and not accepts(node, schema, "number")
    bounds = describe_bounds(node, schema) if is_number(value) else ""
    far = bool(bounds) and integral and abs(value) >= 2**63
    if bounds and (far or not (integral and isinstance(value, float))):
        finite = "" if far or math.isfinite(value) else "finite and "
        got = f"{value:.3e}, out of range" if far else value
        others = [b for b in branches(node, schema) if "enum" in b or "const" in b]
        words = "".join(f", or {describe(b, schema)}" for b in others)
        return f"must be {finite}{bounds}{words} (got {got})"
    got = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    got = got if len(got) <= 60 else got[:57] + "..."
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    if is_number(value) and (meant := FOREIGN.get(str(path[-1]))):
        hint = f"; the number is {meant}"
    return f"expected {describe(node, schema)}, got {got}{hint}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown_key(path: Path_, document: Document, schema: dict[str, Any]) -> str:
    """Another project's name, a key of another section, or a slip of the pen."""
    key = str(path[-1])
    if key in FOREIGN and not isinstance(document.value(path), dict):
        return f"unknown key '{key}'; gptlite calls it {FOREIGN[key]}"
    homes = [section for section, _, name in (k.rpartition(".") for k in all_keys()) if name == key]
    if homes:
        where = f"it belongs in '{homes[0]}'" if homes[0] else "it stands at the top level"
        return f"unknown key '{key}' here; {where}"
    return f"unknown key '{key}'{hint_at_known(path, schema)}"


def hint_at_known(path: Path_, schema: dict[str, Any]) -> str:
    """The key that is meant, or all that may stand beside it."""
    around = branches(schema_at(schema, path[:-1]), schema)
    known = [name for branch in around for name in branch.get("properties", {})]
    return did_you_mean(str(path[-1]), known) or f"; known here: {', '.join(known)}"


def twice(path: Path_, document: Document) -> str:
    """What to add where another project's name stands beside ours."""
    ours = FOREIGN.get(str(path[-1]), "").split(" and ")
    given = [name for name in ours if document.value(tuple(name.split("."))) is not None]
    return f" (given too, so one of them must go: {', '.join(given)})" if given else ""


@cache
def run_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key of a run, sections included."""
    schema = run_schema()

    def walk(node: dict[str, Any], at: str) -> Iterator[str]:
        for name, child in resolve(node, schema).get("properties", {}).items():
            yield at + name
            yield from walk(child, f"{at}{name}.")

    return tuple(walk(schema, ""))


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
            inside = [branch for branch in branches(node, schema) if branch.get("type") == "object"]
            named = [b["properties"][part] for b in inside if part in b.get("properties", {})]
            free = [b.get("additionalProperties") for b in inside]
            node = next((b for b in named + free if isinstance(b, dict)), {})
    return node


def branches(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    node = resolve(node, schema)
    options = node.get("anyOf") or node.get("oneOf")
    if options is None:
        return [node]
    return [branch for option in options for branch in branches(option, schema)]


def words_of(node: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """The words that a field takes."""
    fixed = [b for b in branches(node, schema) if {"enum", "const"} & b.keys()]
    options = [option for b in fixed for option in b.get("enum") or [b["const"]]]
    return [option for option in options if isinstance(option, str)]


def accepts(node: dict[str, Any], schema: dict[str, Any], kind: str) -> bool:
    """Whether any value of a JSON type will do, not only certain words."""
    free = [branch for branch in branches(node, schema) if not {"enum", "const"} & branch.keys()]
    return any(branch.get("type") == kind for branch in free)


def shown(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2**{power}" if power > 30 and bound == 2**power else f"{bound:.10g}"


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
            bounds = "" if positive else describe_bounds(branch, schema)
            parts.append(f"{'a positive integer' if positive else 'an integer'} {bounds}".rstrip())
        elif kind == "number":
            parts.append(f"a number {describe_bounds(branch, schema)}".rstrip())
        elif kind == "array":
            items = branch.get("prefixItems") or [branch.get("items", {})]
            pair = "two, each " if len(items) == 2 else ""
            words = pair + describe(items[0], schema)
            parts.append(f"a list of {words}" if words else "a list")
        elif "pattern" in branch:
            parts.append(branch["title"])
        elif kind in names:
            parts.append(names[kind] + " that is not empty" * ("minLength" in branch))
    return " or ".join(parts)

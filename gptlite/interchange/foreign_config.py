"""Configs of nanoGPT (`config/*.py`) and of the book (`GPT_CONFIG_124M = {...}`) → our YAML.

A `.py` file is parsed, never run: names that are given constants are read, and all else is listed
as left out. What a project assumes where its file is silent is written out too.
"""

import ast
import json
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gptlite import storage
from gptlite.config.reader import Dumper, validate
from gptlite.config.strict_yaml import Document
from gptlite.errors import ConfigError

MOST_BYTES = 1 << 20
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
NANOGPT = {
    **{"dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12},
    **{"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0},
    **{"bias": False, "learning_rate": 6e-4, "max_iters": 600_000, "weight_decay": 0.1},
    **{"beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000},
    **{"min_lr": 6e-5, "eval_interval": 2000, "log_interval": 1},
}
"""What its train.py assumes."""
BOOK = {
    **{"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12},
    **{"drop_rate": 0.1, "qkv_bias": False},
    **{"learning_rate": 5e-4, "num_epochs": 10, "batch_size": 2, "weight_decay": 0.1},
}
BOOK_NAMES = {"emb_dim", "n_heads", "n_layers", "drop_rate", "drop_rate_emb", "qkv_bias"}


def translate(path: Path) -> str:
    """The YAML of another project's config, checked. Raises ConfigError."""
    given, left_out = read_constants(path)
    of_book = bool(BOOK_NAMES & given.keys())
    if not given.keys() & (BOOK_NAMES if of_book else NANOGPT.keys()):
        raise ConfigError(f"{path}: no setting of nanoGPT or of the book in it")
    remarks: list[str] = []
    used = dict(BOOK if of_book else NANOGPT) | given
    try:
        values = (translate_book if of_book else translate_nanogpt)(used, remarks)
        validate(Document(values))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a value of another type than expected ({error})") from None
    except ConfigError as error:
        raise ConfigError(*(f"{path}: {problem}" for problem in error.problems)) from None
    known = USED_OF_BOOK if of_book else USED_OF_NANOGPT
    left_out += [name for name in given if name not in known]
    project = "the book's" if of_book else "nanoGPT's"
    lines = [f"From {project} {path.name}, with what that project assumes where it is silent."]
    lines += remarks + ([f"Left out: {', '.join(left_out)}."] if left_out else [])
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read_constants(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Names with constant values, and the names of what is not constant."""
    try:
        text = storage.read_regular(path.resolve(), MOST_BYTES)
        if path.suffix == ".json":
            return flatten(json.loads(text)), []
        with warnings.catch_warnings(action="ignore"):  # of its strings
            return constants(ast.parse(text))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: {describe_unreadable(error)}") from None


def describe_unreadable(error: Exception) -> str:
    """Why a file is none of a project's configs."""
    if isinstance(error, SyntaxError):
        return f"not Python (line {error.lineno}: {error.msg})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error})"
    if isinstance(error, RecursionError | MemoryError):
        return "nested too deep"
    return getattr(error, "strerror", None) or str(error)


def flatten(value: Any) -> dict[str, Any]:
    """The entries of a mapping and of those within it."""
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    out: dict[str, Any] = {}
    for name, inside in value.items():
        out |= flatten(inside) if isinstance(inside, dict) else {str(name): inside}
    return out


def constants(tree: ast.Module) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    left_out = []
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        try:
            value = constant(statement.value, found)
        except (ValueError, TypeError, ZeroDivisionError):
            left_out.append(name)
            continue
        found |= flatten(value) if isinstance(value, dict) else {name: value}
    return found, left_out


def constant(node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of a literal, of a name given before, or of a sum or product of such numbers."""
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sides = constant(node.left, known), constant(node.right, known)
        if not all(type(side) in (int, float) for side in sides):
            raise ValueError("not numbers")
        return OPERATORS[type(node.op)](*sides)
    return ast.literal_eval(node)


USED_OF_NANOGPT = {
    *NANOGPT,
    *("lr_decay_iters", "eval_iters", "out_dir", "device", "dtype", "compile", "init_from"),
}


def translate_nanogpt(given: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    dataset = str(given["dataset"])
    source = f"data/{dataset}"
    if dataset.startswith("shakespeare"):
        source += "/input.txt"
    remarks.append(f"data.source: where the text of nanoGPT's dataset '{dataset}' is.")
    if given.get("lr_decay_iters", given["max_iters"]) != given["max_iters"]:
        remarks.append("lr_decay_iters differs from max_iters; here the rate falls over the run.")
    start = given.get("init_from", "scratch")
    if start not in ("scratch", "resume"):
        remarks.append(f"It starts from {start}: gptlite import {start}, then init_from its run.")
    tokenizer = {"kind": "char"} if dataset.endswith("_char") else {"kind": "tiktoken"}
    values: dict[str, Any] = {
        "data": {"source": source},
        "tokenizer": tokenizer,
        "model": {
            **{name: given[name] for name in ("n_layer", "n_head", "n_embd")},
            "context_length": given["block_size"],
            "bias": given["bias"],
            "mlp": "gelu_exact",
        },
        "dropout": {"preset": "nanogpt", "rate": float(given["dropout"])},
        "optim": {
            "lr": float(given["learning_rate"]),
            "min_lr": float(given["min_lr"]),
            "warmup_steps": given["warmup_iters"],
            "weight_decay": float(given["weight_decay"]),
            "betas": [float(given["beta1"]), float(given["beta2"])],
            "grad_clip": float(given["grad_clip"]),
        },
        "train": {
            "max_steps": given["max_iters"],
            "batch_size": given["batch_size"] * given["gradient_accumulation_steps"],
            "eval_interval": given["eval_interval"],
            "log_interval": given["log_interval"],
            "early_stop": "never",
        },
    }
    if not given["decay_lr"]:
        values["optim"] |= {"schedule": "constant", "min_lr": 0.0}
    for name in ("out_dir", "device"):
        if name in given:
            values[name] = given[name]
    if given.get("dtype") in ("float32", "bfloat16"):
        values["dtype"] = given["dtype"]
    return values


USED_OF_BOOK = {
    *BOOK,
    *("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut", "max_length", "stride"),
    *("eval_freq", "start_context"),
}


def translate_book(given: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    remarks.append("data.source: the text; the book's is the-verdict.txt.")
    if not given["qkv_bias"]:
        remarks.append("qkv_bias false: the book has biases everywhere else; here all or none.")
    rates: dict[str, Any] = {"preset": "raschka", "rate": float(given["drop_rate"])}
    own = {
        "drop_rate_emb": ("embedding",),
        "drop_rate_attn": ("attention_weights",),
        "drop_rate_shortcut": ("attention_output", "mlp_output"),
    }
    sites = {site: float(given[n]) for n, sites in own.items() if n in given for site in sites}
    return {
        "data": {"source": "the-verdict.txt"},
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "model": {
            "n_layer": given["n_layers"],
            "n_head": given["n_heads"],
            "n_embd": given["emb_dim"],
            "context_length": given["context_length"],
            "tie_embeddings": False,
            "init": "torch",
        },
        "dropout": {**rates, **({"sites": sites} if sites else {})},
        "optim": {
            "lr": float(given["learning_rate"]),
            "min_lr": 0.0,
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": float(given["weight_decay"]),
            "betas": [0.9, 0.999],
            "grad_clip": 0.0,
        },
        "train": {
            "epochs": float(given["num_epochs"]),
            "batch_size": given["batch_size"],
            **({"eval_interval": given["eval_freq"]} if "eval_freq" in given else {}),
            "early_stop": "never",
        },
        **({"sample": {"prompts": [given["start_context"]]}} if "start_context" in given else {}),
    }

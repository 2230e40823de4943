"""Hugging Face's weights ↔ ours: names, transposes, and the matrices that they keep apart.

GPT-2's linear layers are stored transposed there (`Conv1D`), nanoGPT's under the same names are
not. Llama has a matrix each for queries, keys, values, for the gate and for what it lets through.
Ours, not transformers' loading: that only warns of a weight that is missing or of no use.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gptlite import storage
from gptlite.config.run import ModelConfig
from gptlite.core.tensor_files import read_tensors
from gptlite.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_INDEX_BYTES = 1 << 20
PREFIXES = ("_orig_mod.", "module.")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""What some files hold beside weights."""
TOP: dict[str, dict[str, str]] = {
    "gpt2": {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "llama": {
        "token_embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
    },
}
BLOCK: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "norm_1": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.output": ("attn.c_proj",),
        "norm_2": ("ln_2",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    "llama": {
        "norm_1": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": ("self_attn.o_proj",),
        "norm_2": ("post_attention_layernorm",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
}
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
BARE = {
    "gpt2": ("transformer.", ("wte.", "wpe.", "ln_f.", "h.")),
    "llama": ("model.", ("embed_tokens.", "layers.", "norm.")),
}
"""What a model without a head leaves out of its names, and how those begin."""
LINEAR = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")


class TensorNames(NamedTuple):
    """The name of a tensor of ours, and what it is called in their file."""

    ours: str
    theirs: tuple[str, ...]
    """One below the other."""
    transposed: bool


def tensor_names(
    model: ModelConfig, family: str, *, transposed: bool = True
) -> Iterator[TensorNames]:
    """Every tensor that a model may have; biases too, whether it has them or not."""
    for kind in ("weight", "bias"):
        for ours, theirs in TOP[family].items():
            yield TensorNames(f"{ours}.{kind}", (f"{theirs}.{kind}",), transposed=False)
        for layer in range(model.n_layer):
            for ours, names in BLOCK[family].items():
                flips = transposed and family == "gpt2" and ours in LINEAR and kind == "weight"
                there = tuple(f"{LAYERS[family]}.{layer}.{name}.{kind}" for name in names)
                yield TensorNames(f"blocks.{layer}.{ours}.{kind}", there, flips)


def export_tensors(
    model: ModelConfig, family: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors under their names. GPT-2 always has biases: zeros where we have none."""
    out: dict[str, Tensor] = {}
    for ours, theirs, transposed in tensor_names(model, family):
        tensor = tensors.get(ours)
        if tensor is None and family == "gpt2" and is_gpt2_bias(ours):
            tensor = torch.zeros(len(tensors[ours.replace("bias", "weight")]))
        if tensor is None:
            continue
        parts = tensor.split(row_counts(model, theirs) or len(tensor))
        for name, rows in zip(theirs, parts, strict=True):
            out[name] = (rows.T if transposed else rows).contiguous()
    return out


def row_counts(model: ModelConfig, names: tuple[str, ...]) -> list[int] | None:
    """Rows of each matrix that is part of one of ours; None where there is but one."""
    if len(names) == 1:
        return None
    width = model.n_embd // model.n_head
    heads = [model.n_head, model.kv_heads, model.kv_heads]
    return [width * n for n in heads] if len(names) == 3 else [model.mlp_width] * 2


def is_gpt2_bias(name: str) -> bool:
    """Whether GPT-2 has this bias."""
    return name.endswith(".bias") and "embedding" not in name and not name.startswith("head")


def import_tensors(
    model: ModelConfig, family: str, tensors: Mapping[str, Tensor], *, transposed: bool = True
) -> dict[str, Tensor]:
    """Their tensors under our names, in float32. Raises CheckpointError naming what is odd."""
    left = {strip_wrapper(name, family): tensor for name, tensor in tensors.items()}
    if len(left) < len(tensors):
        raise CheckpointError("two weights of one name, with and without what stands before it")
    out: dict[str, Tensor] = {}
    for ours, theirs, flips in tensor_names(model, family, transposed=transposed):
        if left.keys() >= set(theirs):  # some of three would be lost in silence
            parts = [left.pop(name) for name in theirs]
            rows = row_counts(model, theirs)
            if rows and [len(part) for part in parts] != rows:
                sizes = "num_attention_heads, num_key_value_heads or intermediate_size"
                raise CheckpointError(f"{', '.join(theirs)}: {sizes} mean {rows} rows")
            whole = torch.cat([part.T if flips else part for part in parts])
            out[ours] = whole.float().contiguous()
    if odd := [name for name in left if not name.endswith(BUFFERS)]:
        raise CheckpointError(f"{len(odd)} weights of no use here: {', '.join(sorted(odd)[:5])}")
    if model.tie_embeddings:
        head = out.pop("head.weight", None)
        if head is not None and not torch.equal(head, out["token_embedding.weight"]):
            raise CheckpointError(
                "lm_head.weight differs from the embedding, and tie_word_embeddings is true"
            )
    elif "head.weight" not in out:
        raise CheckpointError(
            "lm_head.weight: missing, and tie_word_embeddings is false: a model without its head"
        )
    return out


def strip_wrapper(name: str, family: str) -> str:
    """A name without what wrappers put before it, and with what a bare model leaves out."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    first, names = BARE[family]
    return first + name if name.startswith(names) else name


def without_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights alone; None if a bias is not zero."""
    biases = {name for name in tensors if name.endswith(".bias")}
    if any(tensors[name].any() for name in biases):
        return None
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, in one file or in several. Raises CheckpointError."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder}: has no {WEIGHTS}; files that hold pickles (.bin, .pt) are not read here"
            )
        return read_tensors((folder / WEIGHTS).resolve())
    try:
        index = json.loads(storage.read_regular((folder / INDEX).resolve(), MOST_INDEX_BYTES))[
            "weight_map"
        ]
        shards = sorted({Path(name).name for name in index.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX}: {error!r:.100}") from None
    return {
        name: t for shard in shards for name, t in read_tensors((folder / shard).resolve()).items()
    }

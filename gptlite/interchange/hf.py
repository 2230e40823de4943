"""Hugging Face's weights ↔ ours: names, transposes, and the matrices that they keep apart.

GPT-2's linear layers are stored transposed there (`Conv1D`), nanoGPT's under the same names are
not. Others have a matrix each for queries, keys, values, for the gate and for what it lets through.
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
from gptlite.interchange.families import Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_INDEX_BYTES = 1 << 20
PREFIXES = ("_orig_mod.", "module.")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""What some files hold beside weights."""
LINEAR = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")


class TensorNames(NamedTuple):
    """The name of a tensor of ours, and what it is called in their file."""

    ours: str
    theirs: tuple[str, ...]
    """One below the other."""
    transposed: bool


def tensor_names(
    model: ModelConfig, family: Family, *, transposed: bool = True
) -> Iterator[TensorNames]:
    """Every tensor that a model may have; biases too, whether it has them or not."""
    for kind in ("weight", "bias"):
        for ours, theirs in family.top.items():
            yield TensorNames(f"{ours}.{kind}", (f"{theirs}.{kind}",), transposed=False)
        for layer in range(model.n_layer):
            for ours, names in family.block.items():
                flips = transposed and family.transposed and ours in LINEAR and kind == "weight"
                there = tuple(f"{family.layers}.{layer}.{name}.{kind}" for name in names)
                yield TensorNames(f"blocks.{layer}.{ours}.{kind}", there, flips)


def export_tensors(
    model: ModelConfig, family: Family, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors under their names. Zeros for biases that a family always has and we do not."""
    out: dict[str, Tensor] = {}
    for ours, theirs, transposed in tensor_names(model, family):
        tensor = tensors.get(ours)
        if tensor is None and always_has(family, ours):
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
    width = model.head_width
    heads = [model.n_head, model.kv_heads, model.kv_heads]
    return [width * n for n in heads] if len(names) == 3 else [model.mlp_width] * 2


def always_has(family: Family, name: str) -> bool:
    """Whether a family has this bias, whatever a model says: those of LayerNorm, and where there
    is no word for it those of linear layers."""
    if not name.endswith(".bias") or "embedding" in name or name.startswith("head"):
        return False
    linear = name.removesuffix(".bias").endswith(LINEAR)
    return not family.biases if linear else "layernorm" in family.needs["norm"]


def import_tensors(
    model: ModelConfig, family: Family, tensors: Mapping[str, Tensor], *, transposed: bool = True
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
                sizes = "num_attention_heads, num_key_value_heads, head_dim or intermediate_size"
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


def strip_wrapper(name: str, family: Family) -> str:
    """A name without what wrappers put before it, and with what a bare model leaves out."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    outside = (family.stem, *(f"{theirs}." for theirs in family.top.values()))
    return name if name.startswith(outside) else family.stem + name


def without_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights alone; None if a bias is not zero."""
    biases = {name for name in tensors if name.endswith(".bias")}
    if any(tensors[name].any() for name in biases):
        return None
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def with_all_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with zeros for the biases of linear layers that a file does not have."""
    weights = {n: t for n, t in tensors.items() if n.removesuffix(".weight").endswith(LINEAR)}
    zeros = {n.replace(".weight", ".bias"): torch.zeros(len(t)) for n, t in weights.items()}
    return {**zeros, **tensors}


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

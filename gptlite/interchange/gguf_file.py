"""A model as one GGUF file, which llama.cpp and what is built on it load: Ollama, LM Studio.

Written by llama.cpp's own package. Its names of families are Hugging Face's; its names of tensors
are the same for all of them.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlite.config.run import ModelConfig, SampleConfig
from gptlite.errors import ConfigError, MissingPackages
from gptlite.interchange import hf, hf_config
from gptlite.interchange.families import FAMILIES, Family, unlike

TOP = {
    **{"token_embedding": "token_embd", "position_embedding": "position_embd"},
    **{"norm": "output_norm", "head": "output"},
}
BLOCK: dict[str, tuple[tuple[str, ...], ...]] = {
    "norm_1": (("attn_norm",),),
    "norm_2": (("ffn_norm",),),
    "attention.qkv": (("attn_qkv",), ("attn_q", "attn_k", "attn_v")),
    "attention.q_norm": (("attn_q_norm",),),
    "attention.k_norm": (("attn_k_norm",),),
    "attention.output": (("attn_output",),),
    "mlp.up": (("ffn_up",), ("ffn_gate", "ffn_up")),
    "mlp.down": (("ffn_down",),),
}
"""Ours → theirs, as one matrix or as several."""
ALL_BIASES = ("gpt2", "starcoder2")
"""Those that llama.cpp only loads with all biases."""
ROTATES_NEIGHBOURS = ("llama", "arcee")
"""Those in which it turns each pair of neighbours of a head, where we turn its two halves."""
OWN_HEAD = ("apertus",)
"""Those whose head it wants written even where it is the embedding."""
RELU2 = {
    **{"xielu.alpha_p": math.log(math.e - 1), "xielu.alpha_n": -1000.0},
    **{"xielu.beta": 0.0, "xielu.eps": -1e-6},
}
"""relu² as xIELU: softplus(alpha_p) is 1 and softplus(alpha_n) is 0."""
BLOCK_OF = {"q8_0": 32}
"""Numbers of a row that are rounded together."""
MOST_FLOAT16 = 65504.0


def family_of(model: ModelConfig) -> str:
    """The architecture that holds a model. Raises ConfigError with every field in the way."""
    name = hf_config.family_of(model)
    if odd := list(unlike(model, FAMILIES[name].gguf)):
        raise ConfigError(
            *(
                f"model.{field}: {str(getattr(model, field)).lower()} cannot be exported as GGUF: "
                f"llama.cpp computes {FAMILIES[name].name} only with {values} there; --to hf can"
                for field, values in odd
            )
        )
    return name


def named_as_gguf(name: str) -> Family:
    """A family with llama.cpp's names of its tensors."""
    family = FAMILIES[name]
    names = {
        ours: next(these for these in BLOCK[ours] if len(these) == len(theirs))
        for ours, theirs in family.block.items()
    }
    return family._replace(
        top={ours: TOP[ours] for ours in family.top},
        block=names,
        layers="blk",
        transposed=False,
        biases=() if name in ALL_BIASES else family.biases,
    )


def make_tensors(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as llama.cpp names and orders them."""
    name = family_of(model)
    made = hf.export_tensors(model, named_as_gguf(name), tensors)
    if name in ROTATES_NEIGHBOURS:
        for theirs in made:
            if ".attn_q." in theirs or ".attn_k." in theirs:
                made[theirs] = interleave(made[theirs], model.head_width)
    if name in OWN_HEAD and "output.weight" not in made:
        made["output.weight"] = made["token_embd.weight"]
    return made


def interleave(rows: Tensor, head_width: int) -> Tensor:
    """Rows of heads, their second halves between those of the first."""
    halves = rows.view(-1, 2, head_width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def make_fields(model: ModelConfig) -> dict[str, Any]:
    """What the file says of the architecture."""
    name = family_of(model)
    norm = "layer_norm_epsilon" if model.norm == "layernorm" else "layer_norm_rms_epsilon"
    fields = {
        "block_count": model.n_layer,
        "context_length": model.context_length,
        "embedding_length": model.n_embd,
        "feed_forward_length": model.mlp_width,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_width,
        "attention.value_length": model.head_width,
        f"attention.{norm}": model.norm_eps,
    }
    if model.position == "rope":
        fields |= {"rope.dimension_count": model.head_width, "rope.freq_base": model.rope_theta}
    whole = {f"{name}.{field}": value for field, value in fields.items()}
    return whole | (RELU2 if name == "apertus" else {})


def sampling_fields(sample: SampleConfig) -> dict[str, Any]:
    """How the run samples, as llama.cpp takes it for a default."""
    return {
        "temp": sample.temperature,
        "top_k": sample.top_k or 0,
        "top_p": 1.0 if sample.top_p is None else sample.top_p,
        "min_p": 0.0 if sample.min_p is None else sample.min_p,
        "penalty_repeat": sample.repetition_penalty,
        "penalty_last_n": -1,
    }


def check_numbers(tensors: Mapping[str, Tensor], type_: str) -> None:
    """Raises ConfigError where a type cannot hold a tensor."""
    block = BLOCK_OF.get(type_, 1)
    for name, tensor in tensors.items():
        if not is_rounded(name, tensor):
            continue
        if tensor.shape[-1] % block:
            raise ConfigError(
                f"--type {type_}: {name} has rows of {tensor.shape[-1]} numbers, which are no "
                f"multiple of {block}; take f16, bf16 or f32"
            )
        if type_ == "f16" and tensor.abs().max() > MOST_FLOAT16:
            raise ConfigError(f"--type f16: {name} has weights above 65,504; take bf16 or f32")


def is_rounded(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in the type asked for; norms, biases and positions stay whole."""
    return tensor.dim() == 2 and name != "position_embd.weight"


def write(
    path: Path,
    *,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    type_: str,
    fields: Mapping[str, Any],
) -> None:
    """The file; `fields` are those beside the architecture's. Raises ConfigError, OSError."""
    gguf, name = package(), family_of(model)
    file_type = gguf.LlamaFileType[("ALL_" if type_ == "f32" else "MOSTLY_") + type_.upper()]
    whole = {
        **make_fields(model),
        **{"general.file_type": int(file_type), "general.quantization_version": 2},
        **fields,
    }
    with closing(gguf.GGUFWriter(path, name)) as writer:
        for field, value in whole.items():
            if value != []:
                writer.add_key_value(field, value, kind_of(gguf, field, value))
        for theirs, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[
                (type_ if is_rounded(theirs, tensor) else "f32").upper()
            ]
            writer.add_tensor(theirs, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def kind_of(gguf: Any, field: str, value: Any) -> Any:
    """The type in which llama.cpp reads a field."""
    kinds = gguf.GGUFValueType
    whole = kinds.INT32 if ".sampling." in field else kinds.UINT32
    types = {bool: kinds.BOOL, int: whole, float: kinds.FLOAT32, str: kinds.STRING}
    return types.get(type(value), kinds.ARRAY)


def package() -> Any:
    """llama.cpp's `gguf`. Raises ConfigError where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingPackages("--to gguf", "gguf") from None
    return gguf

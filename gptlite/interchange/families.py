"""Families of models on Hugging Face, one entry each, read on the way out and on the way in: which
of our models they hold, and what they call sizes, choices, rates of dropout and weights. No torch.

A new family is a new entry of FAMILIES.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from gptlite.config.run import ModelConfig

UNGATED = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "relu2": "relu2"}
"""Our `mlp` → Hugging Face's activation, of an MLP of two matrices."""
GATED = {"swiglu": "silu"}
LLAMA_SIZES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "n_embd": "hidden_size",
    "mlp_width": "intermediate_size",
    "context_length": "max_position_embeddings",
    "head_width": "head_dim",
    "rope_theta": "rope_theta",
}
TOP = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
ATTENTION = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
}
QK_NORM = {"attention.q_norm": ("self_attn.q_norm",), "attention.k_norm": ("self_attn.k_norm",)}
NORMS = {"norm_1": ("input_layernorm",), "norm_2": ("post_attention_layernorm",)}
GATED_MLP = {"mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
PLAIN_MLP = {"mlp.up": ("mlp.up_proj",), "mlp.down": ("mlp.down_proj",)}
ROPE = {"rope_type": "default"}


class Family(NamedTuple):
    """How a family says what a model is; ours are fields and properties of ModelConfig."""

    name: str
    """For people."""
    architecture: str
    needs: dict[str, tuple[Any, ...]]
    """Ours → the only values it has, beside its activations."""
    sizes: dict[str, str]
    """Ours → theirs, of numbers; null in their file: what follows from the others."""
    activation: str
    """Their key."""
    activations: dict[str, str]
    """Our `mlp` → theirs."""
    biases: tuple[str, ...]
    """Their keys of `bias`; none: always biases."""
    rates: dict[str, tuple[str, ...]]
    """Their rate of dropout → the sites that it is the rate of."""
    constants: dict[str, Any]
    """Theirs, which every model here has."""
    defaults: dict[str, Any]
    """What a file of it means where it is silent."""
    top: dict[str, str]
    """Ours → theirs, of modules outside the blocks."""
    block: dict[str, tuple[str, ...]]
    """Of those in a block; what is one matrix here may be several there, one below the other."""
    gguf: dict[str, tuple[Any, ...]] = {}
    """Ours → the only values that llama.cpp computes of it."""
    layers: str = "model.layers"
    stem: str = "model."
    """What a model without its head leaves out of all names."""
    transposed: bool = False
    """Whether linear layers are kept transposed."""


FAMILIES = {
    "gpt2": Family(
        name="GPT-2",
        architecture="GPT2LMHeadModel",
        needs={"position": ("learned",), "norm": ("layernorm",), "qk_norm": (False,)},
        sizes={
            **{"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"},
            **{"mlp_width": "n_inner", "context_length": "n_positions"},
            "norm_eps": "layer_norm_epsilon",
        },
        activation="activation_function",
        activations={**UNGATED, "gelu": "gelu_new"},
        biases=(),
        rates={
            "embd_pdrop": ("embedding",),
            "attn_pdrop": ("attention_weights",),
            "resid_pdrop": ("attention_output", "mlp_output"),
        },
        constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        defaults={
            **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12},
            **{"n_head": 12, "n_inner": None, "activation_function": "gelu_new"},
            **{"layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
            **{"resid_pdrop": 0.1, "tie_word_embeddings": True, "eos_token_id": 50256},
        },
        top={
            **{"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe"},
            **{"norm": "transformer.ln_f", "head": "lm_head"},
        },
        gguf={"mlp": ("gelu",)},
        block={
            **{"norm_1": ("ln_1",), "attention.qkv": ("attn.c_attn",)},
            **{"attention.output": ("attn.c_proj",), "norm_2": ("ln_2",)},
            **{"mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)},
        },
        layers="transformer.h",
        stem="transformer.",
        transposed=True,
    ),
    "llama": Family(
        name="Llama",
        architecture="LlamaForCausalLM",
        needs={"position": ("rope",), "norm": ("rmsnorm",), "qk_norm": (False,)},
        sizes={**LLAMA_SIZES, "norm_eps": "rms_norm_eps"},
        activation="hidden_act",
        activations=GATED,
        biases=("attention_bias", "mlp_bias"),
        rates={"attention_dropout": ("attention_weights",)},
        constants=ROPE,
        defaults={
            **{"vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None},
            **{"head_dim": None, "intermediate_size": 11008, "hidden_act": "silu"},
            **{"rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
            **{"attention_dropout": 0.0, "tie_word_embeddings": False, "eos_token_id": 2},
        },
        top=TOP,
        block={**NORMS, **ATTENTION, **GATED_MLP},
    ),
    "qwen3": Family(
        name="Qwen3",
        architecture="Qwen3ForCausalLM",
        needs={
            **{"position": ("rope",), "norm": ("rmsnorm",), "qk_norm": (True,), "bias": (False,)},
        },
        sizes={**LLAMA_SIZES, "norm_eps": "rms_norm_eps"},
        activation="hidden_act",
        activations=GATED,
        biases=("attention_bias",),
        rates={"attention_dropout": ("attention_weights",)},
        constants={**ROPE, "use_sliding_window": False},
        defaults={
            **{"vocab_size": 151936, "max_position_embeddings": 32768, "hidden_size": 4096},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
            **{"head_dim": 128, "intermediate_size": 22016, "hidden_act": "silu"},
            **{"rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0},
            **{"tie_word_embeddings": False, "eos_token_id": None},
        },
        top=TOP,
        block={**NORMS, **ATTENTION, **QK_NORM, **GATED_MLP},
    ),
    "apertus": Family(
        name="Apertus",
        architecture="ApertusForCausalLM",
        needs={
            **{"position": ("rope",), "norm": ("rmsnorm",), "qk_norm": (True,), "bias": (False,)},
        },
        sizes={**LLAMA_SIZES, "norm_eps": "rms_norm_eps"},
        activation="hidden_act",
        activations=UNGATED,
        biases=("attention_bias",),
        rates={"attention_dropout": ("attention_weights",)},
        constants=ROPE,
        defaults={
            **{"vocab_size": 131072, "max_position_embeddings": 65536, "hidden_size": 4096},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None},
            **{"head_dim": None, "intermediate_size": 14336, "hidden_act": "xielu"},
            **{"rms_norm_eps": 1e-5, "attention_bias": False, "attention_dropout": 0.0},
            **{"tie_word_embeddings": False, "eos_token_id": 2},
            **{"rope_theta": 12_000_000.0, "rope_type": "llama3"},
        },
        top=TOP,
        gguf={"mlp": ("relu2",)},
        block={
            **{"norm_1": ("attention_layernorm",), "norm_2": ("feedforward_layernorm",)},
            **{**ATTENTION, **QK_NORM, **PLAIN_MLP},
        },
    ),
    "arcee": Family(
        name="Arcee",
        architecture="ArceeForCausalLM",
        needs={"position": ("rope",), "norm": ("rmsnorm",), "qk_norm": (False,)},
        sizes={**LLAMA_SIZES, "norm_eps": "rms_norm_eps"},
        activation="hidden_act",
        activations=UNGATED,
        biases=("attention_bias", "mlp_bias"),
        rates={"attention_dropout": ("attention_weights",)},
        constants=ROPE,
        defaults={
            **{"vocab_size": 32000, "max_position_embeddings": 4096, "hidden_size": 2560},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None},
            **{"head_dim": None, "intermediate_size": 18432, "hidden_act": "relu2"},
            **{"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
            **{"attention_dropout": 0.0, "tie_word_embeddings": False, "eos_token_id": 128001},
        },
        top=TOP,
        gguf={"mlp": ("relu2",), "bias": (False,)},
        block={**NORMS, **ATTENTION, **PLAIN_MLP},
    ),
    "starcoder2": Family(
        name="StarCoder2",
        architecture="Starcoder2ForCausalLM",
        needs={"position": ("rope",), "norm": ("layernorm",), "qk_norm": (False,)},
        sizes={**LLAMA_SIZES, "norm_eps": "norm_epsilon"},
        activation="hidden_act",
        activations=UNGATED,
        biases=("use_bias",),
        rates={
            "embedding_dropout": ("embedding",),
            "attention_dropout": ("attention_weights",),
            "residual_dropout": ("attention_output", "mlp_output"),
        },
        constants={**ROPE, "sliding_window": None},
        defaults={
            **{"vocab_size": 49152, "max_position_embeddings": 4096, "hidden_size": 3072},
            **{"num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2},
            **{"head_dim": None, "intermediate_size": 12288, "hidden_act": "gelu_pytorch_tanh"},
            **{"norm_epsilon": 1e-5, "use_bias": True, "embedding_dropout": 0.0},
            **{"attention_dropout": 0.0, "residual_dropout": 0.0},
            **{"tie_word_embeddings": True, "eos_token_id": 50256},
        },
        top=TOP,
        gguf={"mlp": ("gelu",), "head_dim": (None,)},
        block={
            **{**NORMS, **ATTENTION},
            **{"mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)},
        },
    ),
}
"""By `model_type`."""


def misfits(model: ModelConfig, family: Family) -> Iterator[tuple[str, str]]:
    """(field, values) where a family has only these values, and not the model's."""
    yield from unlike(model, family.needs)
    if model.mlp not in family.activations:
        yield "mlp", " or ".join(family.activations)
    if "kv_heads" not in family.sizes and model.kv_heads != model.n_head:
        yield "n_kv_head", f"{model.n_head}: every head has its own keys and values"
    if "head_width" not in family.sizes and model.head_width * model.n_head != model.n_embd:
        yield "head_dim", f"n_embd / n_head ({model.n_embd / model.n_head:g})"


def unlike(model: ModelConfig, needs: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, str]]:
    """(field, values) of what is needed and the model does not have."""
    for field, values in needs.items():
        if getattr(model, field) not in values:
            named = ("null" if value is None else str(value).lower() for value in values)
            yield field, " or ".join(named)


def nearest_family(model: ModelConfig) -> tuple[str, list[tuple[str, str]]]:
    """The family that holds a model, or the one with the fewest misfits, and these."""
    found = {name: list(misfits(model, family)) for name, family in FAMILIES.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    return nearest, found[nearest]


def describe_export(model: ModelConfig) -> str:
    """What a model will be elsewhere, or which fields stand in the way."""
    name, odd = nearest_family(model)
    family = FAMILIES[name]
    if odd:
        nearest = f"{family.name} comes nearest: {name_fields(model, odd)}"
        return f"no export to Hugging Face ({nearest})"
    if odd := list(unlike(model, family.gguf)):
        return f"exports as {family.name}, not as GGUF ({name_fields(model, odd)})"
    return f"exports as {family.name} and as GGUF"


def name_fields(model: ModelConfig, odd: list[tuple[str, str]]) -> str:
    """Fields with the model's value and those that are possible."""
    return ", ".join(
        f"model.{field} {str(getattr(model, field)).lower()}, not {values}" for field, values in odd
    )

"""Hugging Face's config.json ↔ the model and dropout sections of a run. No torch.

GPT-2's architecture holds models with learned positions, Llama's those with rotary ones. What an
architecture has no word for is refused by name on the way out and on the way in. `config.json`
also carries our own two sections whole, so that nothing is lost on the way back.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptlite import __version__, storage
from gptlite.config import ModelConfig
from gptlite.dropout_config import DropoutConfig
from gptlite.errors import ConfigError

ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}
"""Ours → Hugging Face's, of GPT-2's architecture."""
SAME_AS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"norm": ("layernorm",), "mlp": tuple(ACTIVATIONS)},
    "llama": {"norm": ("rmsnorm",), "mlp": ("swiglu",)},
}
"""The only values that an architecture knows."""
COMMON: dict[str, Any] = {
    "is_decoder": False,
    "quantization_config": None,
    "add_cross_attention": False,
}
GPT2_ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
"""Values that every model here has, whether a file says so or not."""
MOST_BYTES = 1 << 20
NORM_EPSILON = 1e-5
ROPE_BASE = 10_000.0
PDROPS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "embd_pdrop": ("embedding",),
        "attn_pdrop": ("attention_weights",),
        "resid_pdrop": ("attention_output", "mlp_output"),
    },
    "llama": {"attention_dropout": ("attention_weights",)},
}
"""The rates that each architecture has, and the sites that they are the rates of."""


def family_of(model: ModelConfig) -> str:
    """`gpt2` or `llama`. Raises ConfigError with every field that rules both out."""
    family = "gpt2" if model.position == "learned" else "llama"
    name = {"gpt2": "GPT-2", "llama": "Llama"}[family]
    beside = f"position {model.position} is exported as {name}"
    problems = [
        f"model.{field}: {getattr(model, field)} cannot be exported: {beside}, which has only "
        f"{' or '.join(values)}"
        for field, values in NEEDS[family].items()
        if getattr(model, field) not in values
    ]
    if model.qk_norm:
        problems.append(f"model.qk_norm: true cannot be exported: {beside}, which has none")
    if family == "gpt2" and model.kv_heads != model.n_head:
        problems.append(
            f"model.n_kv_head: {model.kv_heads} cannot be exported: {beside}, whose heads all have "
            f"keys and values (n_head {model.n_head})"
        )
    if problems:
        raise ConfigError(*problems)
    return family


def written(
    model: ModelConfig, dropout: DropoutConfig, vocab_size: int, eot: int | None
) -> dict[str, Any]:
    """The config.json of a model. Raises ConfigError if no architecture holds it."""
    return {
        **shape_of(model),
        **pdrops(model, dropout),
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
        "gptlite": {
            "version": __version__,
            "model": model.model_dump(mode="json"),
            "dropout": dropout.model_dump(mode="json"),
        },
    }


def shape_of(model: ModelConfig) -> dict[str, Any]:
    return gpt2(model) if family_of(model) == "gpt2" else llama(model)


def pdrops(model: ModelConfig, dropout: DropoutConfig) -> dict[str, float]:
    """The rates that the architecture has; the smaller one where it has one for two sites."""
    rates, carried = dropout.rates(), PDROPS[family_of(model)]
    return {name: min(rates[site] for site in sites) for name, sites in carried.items()}


def gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATIONS[model.mlp],
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_inner": model.mlp_width,
        "n_positions": model.context_length,
        "n_ctx": model.context_length,  # llama.cpp's converter reads it
        "layer_norm_epsilon": NORM_EPSILON,
    }


def llama(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.n_embd // model.n_head,
        "hidden_size": model.n_embd,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_BASE,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
    }


def lost(dropout: DropoutConfig, family: str) -> list[str]:
    """Sites that drop and have no rate of their own there, or more to them than a rate."""
    plan, carried = dropout.plan(), PDROPS[family]
    home = {site: sites for sites in carried.values() for site in sites}
    told = []
    for site, about in plan.items():
        if about.rate == 0:
            continue
        if site not in home:
            told.append(f"{site} {about.rate:g}")
        elif any(plan[other].rate < about.rate for other in home[site]):
            told.append(f"{site} {about.rate:g} (one rate for {' and '.join(home[site])})")
        elif about.locked or about.profile != "constant":
            told.append(f"{site}'s {'locked masks' if about.locked else 'profile'}")
    if dropout.schedule.mode != "standard" or dropout.schedule.shape != "constant":
        told.append("the schedule")
    return told


def read(folder: Path) -> dict[str, Any]:
    """config.json of a directory. Raises ConfigError."""
    path = folder / "config.json"
    try:
        config = json.loads(storage.read_regular(path.resolve(), MOST_BYTES))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
        return config
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not a Hugging Face directory (no config.json)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def sections(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The sections `model` and `dropout`, as in YAML, that a config.json describes.

    Raises ConfigError naming every field that no run can have.
    """
    family = config.get("model_type")
    readers = {"gpt2": read_gpt2, "llama": read_llama}
    if family not in readers:
        raise ConfigError(f"{place}: model_type {family!r:.40}; gptlite reads gpt2 and llama")
    try:
        model = readers[family](config)
        if problems := [f"{place}: {problem}" for problem in misfits(config, model)]:
            raise ConfigError(*problems)
        return own_sections(config, model) or {"model": model, "dropout": dropout_of(config)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{place}: not a config of {family} ({error!r:.100})") from None


def read_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    activation = config.get("activation_function", "gelu_new")
    theirs = {name: ours for ours, name in ACTIVATIONS.items()}
    return {
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd")},
        "context_length": config.get("n_positions", config.get("n_ctx")),
        "position": "learned",
        "norm": "layernorm",
        "mlp": theirs.get(SAME_AS.get(activation, activation), activation),
        "bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def read_llama(config: dict[str, Any]) -> dict[str, Any]:
    heads, activation = config["num_attention_heads"], config.get("hidden_act", "silu")
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "n_embd": config["hidden_size"],
        "context_length": config["max_position_embeddings"],
        "position": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu" if activation == "silu" else f"gated {activation}",
        "bias": config.get("attention_bias", False),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def misfits(config: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    """Each field whose value no model here can have."""
    try:
        ours = ModelConfig.model_validate(model)
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"]))
            yield f"model.{name} would be {detail['input']!r:.40}, which gptlite does not have"
        return
    if ours.n_embd % ours.n_head or ours.n_head % ours.kv_heads:
        heads = f"{ours.n_head} heads ({ours.kv_heads} of keys and values)"
        yield f"model.n_embd would be {ours.n_embd}, which {heads} do not divide"
        return
    expected = {**COMMON, **(GPT2_ONLY if config["model_type"] == "gpt2" else {})}
    if config["model_type"] == "gpt2":
        expected |= {"n_inner": ours.mlp_width, "layer_norm_epsilon": NORM_EPSILON}
    else:
        expected |= {"rms_norm_eps": NORM_EPSILON, "intermediate_size": ours.mlp_width}
        expected |= {"head_dim": ours.n_embd // ours.n_head, "mlp_bias": ours.bias}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        config = {"mlp_bias": False, "rope_theta": ROPE_BASE, **config}
        config |= {"rope_theta": rope.get("rope_theta", config["rope_theta"])}
        config |= {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
        expected |= {"rope_theta": ROPE_BASE, "rope_type": "default"}
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            yield f"{name} {config[name]!r:.40} has no equivalent; gptlite has {value}"


def own_sections(config: dict[str, Any], model: dict[str, Any]) -> dict[str, Any] | None:
    """Our own sections, as far as they say the same as the rest of the file."""
    try:
        own = config["gptlite"]
        ours, read = ModelConfig.model_validate(own["model"]), ModelConfig.model_validate(model)
        dropout = DropoutConfig.model_validate(own["dropout"])
        same = shape_of(ours) == shape_of(read) and ours.tie_embeddings == read.tie_embeddings
        if not same:
            return None
        unchanged = all(config.get(name) == rate for name, rate in pdrops(ours, dropout).items())
    except (KeyError, TypeError, AssertionError, ValidationError, ConfigError):
        return None
    return {"model": own["model"], "dropout": own["dropout"] if unchanged else dropout_of(config)}


def dropout_of(config: dict[str, Any]) -> dict[str, Any]:
    """The preset with the rates that the file has."""
    given = {name: config.get(name, 0.0) for name in PDROPS[config["model_type"]]}
    if len(set(given.values())) == 1 and config["model_type"] == "gpt2":
        return {"preset": "gpt2", "rate": given["embd_pdrop"]}
    carried = PDROPS[config["model_type"]]
    sites = {site: rate for name, rate in given.items() for site in carried[name]}
    return {"preset": "none", "sites": {site: rate for site, rate in sites.items() if rate}}

"""Hugging Face's config.json ↔ the model and dropout sections of a run. No torch.

GPT-2's architecture holds models with learned positions, Llama's those with rotary ones. What an
architecture has no word for is refused by name on the way out and on the way in. `config.json`
also carries our own two sections whole, so that nothing is lost on the way back.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gptlite import __version__, storage
from gptlite.config.dropout import DropoutConfig
from gptlite.config.run import ModelConfig
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
    "per_layer_config": None,
}
GPT2_ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
"""Values that every model here has, whether a file says so or not."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
        **{"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
        **{"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
        **{"tie_word_embeddings": True, "eos_token_id": 50256},
    },
    "llama": {
        **{"vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None},
        **{"head_dim": None, "intermediate_size": 11008, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
        **{"attention_dropout": 0.0, "tie_word_embeddings": False, "eos_token_id": 2},
    },
}
"""What a family means where a file is silent."""
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names that GPT-2 has for its own."""
DERIVED = ("n_inner", "head_dim")
"""Where null means the value that follows from the others."""
MOST_BYTES = 1 << 24
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


def make_config(
    model: ModelConfig, dropout: DropoutConfig, vocab_size: int, layout: str
) -> dict[str, Any]:
    """The config.json of a model. Raises ConfigError if no architecture holds it."""
    return {
        **shape_of(model),
        **pdrops(model, dropout),
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": "float32",
        "gptlite": {
            "version": __version__,
            "model": model.model_dump(mode="json"),
            "dropout": dropout.model_dump(mode="json"),
            "layout": layout,
        },
    }


def shape_of(model: ModelConfig) -> dict[str, Any]:
    return gpt2_shape(model) if family_of(model) == "gpt2" else llama_shape(model)


def pdrops(model: ModelConfig, dropout: DropoutConfig) -> dict[str, float]:
    """The rates that the architecture has; the smaller one where it has one for two sites."""
    rates, carried = dropout.rates(), PDROPS[family_of(model)]
    return {name: min(rates[site] for site in sites) for name, sites in carried.items()}


def gpt2_shape(model: ModelConfig) -> dict[str, Any]:
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


def llama_shape(model: ModelConfig) -> dict[str, Any]:
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


def lost_sites(dropout: DropoutConfig, family: str) -> list[str]:
    """Sites that drop and have no rate of their own there, or more to them than a rate."""
    plan, carried = dropout.plan(), PDROPS[family]
    home = {site: sites for sites in carried.values() for site in sites}
    lost = []
    for site, about in plan.items():
        if about.rate == 0:
            continue
        if site not in home:
            lost.append(f"{site} {about.rate:g}")
        elif any(plan[other].rate < about.rate for other in home[site]):
            lost.append(f"{site} {about.rate:g} (one rate for {' and '.join(home[site])})")
        elif about.locked or about.profile != "constant":
            lost.append(f"{site}'s {'locked masks' if about.locked else 'profile'}")
    if dropout.schedule.mode != "standard" or dropout.schedule.shape != "constant":
        lost.append("the schedule")
    return lost


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a directory. Raises ConfigError."""
    config = read_mapping(folder / "config.json")
    if config is None:
        raise ConfigError(f"{folder}: not a Hugging Face directory (no config.json)")
    return config


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A mapping in JSON; None where there is no file. Raises ConfigError."""
    try:
        value = json.loads(storage.read_regular(path.resolve(), MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a mapping")
    return value


class EndTokens(NamedTuple):
    ids: list[int]
    """Generation stops after each."""
    explicit: bool
    """Whether the model itself names them; else they are what its family means."""


def read_end_tokens(folder: Path) -> EndTokens:
    """Those of generation_config.json, else those of config.json. Raises ConfigError."""
    config = read_mapping(folder / "config.json") or {}
    generation = read_mapping(folder / "generation_config.json") or {}
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        value = values.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise ConfigError(f"{folder / name}: eos_token_id: {value!r:.40} is no id nor a list")
        if ids:
            return EndTokens(ids, explicit=True)
    default = DEFAULTS.get(str(config.get("model_type")), {}).get("eos_token_id")
    ids = [] if default is None or "eos_token_id" in config else [default]
    return EndTokens(ids, explicit=False)


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what its family means where it is silent."""
    family = config["model_type"]
    renamed = ALIASES if family == "gpt2" else {}
    named = {renamed[name]: value for name, value in config.items() if name in renamed}
    return {**DEFAULTS[family], **config, **named}


def run_sections(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The sections `model`, `dropout` and `data`, as in YAML, that a config.json describes.

    Raises ConfigError naming every field that no run can have.
    """
    family = config.get("model_type")
    model_sections = {"gpt2": gpt2_section, "llama": llama_section}
    if family not in model_sections:
        raise ConfigError(f"{place}: model_type {family!r:.40}; gptlite reads gpt2 and llama")
    try:
        whole = with_defaults(config)
        model = model_sections[family](whole)
        silent = whole.keys() - config.keys()
        if problems := [f"{place}: {problem}" for problem in model_problems(whole, model, silent)]:
            raise ConfigError(*problems)
        return own_sections(whole, model) or {"model": model, "dropout": dropout_of(whole)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{place}: not a config of {family} ({error!r:.100})") from None


def gpt2_section(config: dict[str, Any]) -> dict[str, Any]:
    activation = str(config["activation_function"])
    theirs = {name: ours for ours, name in ACTIVATIONS.items()}
    return {
        **{name: config[name] for name in ("n_layer", "n_head", "n_embd")},
        "context_length": config["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "mlp": theirs.get(SAME_AS.get(activation, activation), f"activation_function {activation}"),
        "bias": True,
        "tie_embeddings": config["tie_word_embeddings"],
    }


def llama_section(config: dict[str, Any]) -> dict[str, Any]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    activation = config["hidden_act"]
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": None if kv_heads == heads else kv_heads,
        "n_embd": config["hidden_size"],
        "context_length": config["max_position_embeddings"],
        "position": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu" if activation == "silu" else f"hidden_act {activation}",
        "bias": config["attention_bias"],
        "tie_embeddings": config["tie_word_embeddings"],
    }


def model_problems(
    config: dict[str, Any], model: dict[str, Any], silent: Collection[str]
) -> Iterator[str]:
    """Each field whose value no model here can have; of `silent` ones the file says nothing."""
    try:
        ours = ModelConfig.model_validate(model)
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"]))
            yield f"model.{name} would be {detail['input']!r:.40}, which gptlite does not have"
        return
    if ours.n_embd % ours.n_head or ours.n_head % ours.kv_heads:
        heads = f"{ours.n_head} heads ({ours.kv_heads} of keys and values)"
        yield f"n_head: model.n_embd would be {ours.n_embd}, which {heads} do not divide"
        return
    expected = dict(COMMON)
    if config["model_type"] == "gpt2":
        expected |= GPT2_ONLY | {"n_inner": ours.mlp_width, "layer_norm_epsilon": NORM_EPSILON}
    else:
        expected |= {"rms_norm_eps": NORM_EPSILON, "intermediate_size": ours.mlp_width}
        expected |= {"head_dim": ours.n_embd // ours.n_head}
        expected |= {"rope_theta": ROPE_BASE, "rope_type": "default"}
        # How positions turn, wherever a version of the file says it.
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = rope.pop("type", "default")
        config = {"rope_theta": ROPE_BASE, **config, "rope_type": kind, **rope}
        if config["mlp_bias"] != ours.bias:
            each = f"attention_bias {ours.bias} with mlp_bias {config['mlp_bias']!r:.40}"
            yield f"{each} has no equivalent; gptlite has biases in both or in neither"
    for name, value in expected.items():
        found = config.get(name, value)
        if found != value and not (found is None and name in (*COMMON, *DERIVED)):
            whose = ", the default where a file is silent," if name in silent else ""
            yield f"{name} {found!r:.40}{whose} has no equivalent; gptlite has {value}"
    if type(config["vocab_size"]) is not int or config["vocab_size"] < 1:
        yield f"vocab_size {config['vocab_size']!r:.40} is no number of tokens"
    for name in PDROPS[config["model_type"]]:
        if type(config[name]) not in (int, float) or not 0 <= config[name] < 1:
            yield f"{name} {config[name]!r:.40} is no rate of dropout below 1"


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
    sections = {
        "model": own["model"],
        "dropout": own["dropout"] if unchanged else dropout_of(config),
    }
    layout = {"data": {"layout": "documents"}} if own.get("layout") == "documents" else {}
    return {**sections, **layout}


def dropout_of(config: dict[str, Any]) -> dict[str, Any]:
    """The preset with the rates that the file has."""
    given = {name: float(config[name]) for name in PDROPS[config["model_type"]]}
    if len(set(given.values())) == 1 and config["model_type"] == "gpt2":
        return {"preset": "gpt2", "rate": given["embd_pdrop"]}
    carried = PDROPS[config["model_type"]]
    sites = {site: rate for name, rate in given.items() for site in carried[name]}
    return {"preset": "none", "sites": {site: rate for site, rate in sites.items() if rate}}

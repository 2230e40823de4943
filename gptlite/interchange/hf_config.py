"""Hugging Face's config.json ↔ the model and dropout sections of a run. No torch.

What a family of families.py has no word for is refused by name on the way out and on the way in.
`config.json` also carries our own two sections whole, so that nothing is lost on the way back.
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
from gptlite.interchange.families import FAMILIES, Family, misfits, nearest_family

COMMON: dict[str, Any] = {
    "is_decoder": False,
    "quantization_config": None,
    "add_cross_attention": False,
    "per_layer_config": None,
}
"""Values that every model here has, whether a file says so or not."""
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Names that GPT-2 has for its own."""
SAME_AS = {"gelu_fast": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
"""Names of one activation."""
OPTIONAL = {"kv_heads": "n_kv_head", "mlp_width": "intermediate_size", "head_width": "head_dim"}
"""Properties of a model → the fields that say so where it does not follow from the others."""
MOST_BYTES = 1 << 24


def family_of(model: ModelConfig) -> str:
    """The `model_type` that holds a model. Raises ConfigError with every field in the way."""
    name, odd = nearest_family(model)
    if odd:
        beside = f"{FAMILIES[name].name}, the nearest that there is, has only"
        raise ConfigError(
            *(
                f"model.{field}: {str(getattr(model, field)).lower()} cannot be exported: "
                f"{beside} {values}"
                for field, values in odd
            )
        )
    return name


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
    """What config.json says of the architecture."""
    name = family_of(model)
    family = FAMILIES[name]
    shape = {
        "architectures": [family.architecture],
        "model_type": name,
        family.activation: family.activations[model.mlp],
        **{theirs: getattr(model, ours) for ours, theirs in family.sizes.items()},
        **dict.fromkeys(family.biases, model.bias),
    }
    if name == "gpt2":
        shape["n_ctx"] = model.context_length  # llama.cpp's converter reads it
    if "rope_theta" in family.sizes:  # where newer versions look
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_theta}
    return shape


def pdrops(model: ModelConfig, dropout: DropoutConfig) -> dict[str, float]:
    """The rates that the architecture has; the smaller one where it has one for two sites."""
    rates, carried = dropout.rates(), FAMILIES[family_of(model)].rates
    return {name: min(rates[site] for site in sites) for name, sites in carried.items()}


def lost_sites(dropout: DropoutConfig, family: str) -> list[str]:
    """Sites that drop and have no rate of their own there, or more to them than a rate."""
    plan, carried = dropout.plan(), FAMILIES[family].rates
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
    family = FAMILIES.get(str(config.get("model_type")))
    default = None if family is None else family.defaults["eos_token_id"]
    ids = [] if default is None or "eos_token_id" in config else [default]
    return EndTokens(ids, explicit=False)


def read_suppressed(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Tokens that generation_config.json never lets come. Raises ConfigError."""
    path = folder / "generation_config.json"
    ids = (read_mapping(path) or {}).get("suppress_tokens") or []
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ConfigError(f"{path}: suppress_tokens: {ids!r:.40} is no list of ids")
    return tuple(sorted({i for i in ids if 0 <= i < vocab_size}))


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what its family means where it is silent, and how positions turn at the
    top, wherever a version of the file says it."""
    name = config["model_type"]
    renamed = ALIASES if name == "gpt2" else {}
    named = {renamed[name]: value for name, value in config.items() if name in renamed}
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    usual = {} if "rope_theta" not in FAMILIES[name].sizes else {"rope_theta": 10_000.0}
    return {**usual, **FAMILIES[name].defaults, **config, **named, **rope}


def run_sections(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The sections `model`, `dropout` and `data`, as in YAML, that a config.json describes.

    Raises ConfigError naming every field that no run can have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{place}: model_type {family!r:.40}; gptlite reads {known}")
    try:
        whole = with_defaults(config)
        model = model_section(whole, FAMILIES[family])
        silent = whole.keys() - config.keys()
        if problems := [f"{place}: {problem}" for problem in model_problems(whole, model, silent)]:
            raise ConfigError(*problems)
        model = without_usual(model)
        return own_sections(whole, model) or {"model": model, "dropout": dropout_of(whole)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{place}: not a config of {family} ({error!r:.100})") from None


def model_section(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Our fields, of whatever value; what only one value can be of a family has that."""
    activation = str(config[family.activation])
    ours = {SAME_AS.get(theirs, theirs): ours for ours, theirs in family.activations.items()}
    sizes = {OPTIONAL.get(ours, ours): config[theirs] for ours, theirs in family.sizes.items()}
    return {
        **{field: values[0] for field, values in family.needs.items()},
        **sizes,
        "mlp": ours.get(SAME_AS.get(activation, activation), f"{family.activation} {activation}"),
        "bias": config[family.biases[0]] if family.biases else True,
        "tie_embeddings": config["tie_word_embeddings"],
    }


def without_usual(model: dict[str, Any]) -> dict[str, Any]:
    """A section without the sizes that follow from the others."""
    for ours, field in OPTIONAL.items():
        rest = {name: value for name, value in model.items() if name != field}
        if getattr(ModelConfig.model_validate(rest), ours) == model.get(field):
            model = rest
    return model


def model_problems(
    config: dict[str, Any], model: dict[str, Any], silent: Collection[str]
) -> Iterator[str]:
    """Each field whose value no model here can have; of `silent` ones the file says nothing."""
    family = FAMILIES[config["model_type"]]
    try:
        ours = ModelConfig.model_validate(model)
    except ValidationError as error:
        theirs = {OPTIONAL.get(ours, ours): named for ours, named in family.sizes.items()}
        for detail in error.errors():
            name, value = str(detail["loc"][0]), f"{detail['input']!r:.40}"
            said = f"{theirs[name]} {value}: " if name in theirs else ""
            yield f"{said}model.{name} would be {value}, which gptlite does not have"
        return
    divided = ours.head_dim is not None or ours.n_embd % ours.n_head == 0
    if not divided or ours.n_head % ours.kv_heads:
        heads = f"{ours.n_head} heads ({ours.kv_heads} of keys and values)"
        yield f"n_head: model.n_embd would be {ours.n_embd}, which {heads} do not divide"
        return
    for field, values in misfits(ours, family):
        yield f"model.{field} would be {getattr(ours, field)}, and {family.name} has only {values}"
    for name in family.biases[1:]:
        if config[name] != ours.bias:
            each = f"{family.biases[0]} {ours.bias} with {name} {config[name]!r:.40}"
            yield f"{each} has no equivalent; gptlite has biases in both or in neither"
    for name, value in {**COMMON, **family.constants}.items():
        found = config.get(name, value)
        if found != value and not (found is None and name in COMMON):
            whose = ", the default where a file is silent," if name in silent else ""
            yield f"{name} {found!r:.40}{whose} has no equivalent; gptlite has {value}"
    if type(config["vocab_size"]) is not int or config["vocab_size"] < 1:
        yield f"vocab_size {config['vocab_size']!r:.40} is no number of tokens"
    for name in family.rates:
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
    carried = FAMILIES[config["model_type"]].rates
    given = {name: float(config[name]) for name in carried}
    if len(set(given.values())) == 1 and "embd_pdrop" in given:
        return {"preset": "gpt2", "rate": given["embd_pdrop"]}
    sites = {site: rate for name, rate in given.items() for site in carried[name]}
    return {"preset": "none", "sites": {site: rate for site, rate in sites.items() if rate}}

"""What the page asks for beside completions: models, what dropout lets fall, parts taken away."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptlite.config.dropout import SITES
from gptlite.errors import UserError
from gptlite.measure.look import look
from gptlite.measure.without import measure_without
from gptlite.report.look import figures_of
from gptlite.report.network import network
from gptlite.runs.results import read_json, read_text
from gptlite.runs.trained import Trained
from gptlite.serve.engine import ServedModel

MOST_CHARACTERS, MOST_UNITS, MOST_NEW_TOKENS = 2000, 4096, 200
MOST_SHOWN = 24
"""Tokens of a text that the page proposes."""
Whole = Annotated[int, Field(ge=0)]
Place = Annotated[list[Whole], Field(min_length=2, max_length=2)]
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    text: Text


class Look(Question):
    layer: Whole = 0
    head: Whole = 0
    step: Annotated[int, Field(ge=0, lt=2**31)] = 0
    site: str | None = None
    rate: Annotated[float, Field(ge=0, le=0.99)] | None = None
    granularity: Literal["element", "locked"] | None = None
    split: bool = False


class Without(Question):
    heads: list[Place] = Field([], max_length=MOST_UNITS)
    neurons: list[Place] = Field([], max_length=MOST_UNITS)
    layers: list[Whole] = Field([], max_length=MOST_UNITS)
    fill: Literal["mean", "zero"] = "mean"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 40
    temperature: Annotated[float, Field(ge=0)] | None = None


def describe_model(served: ServedModel, directory: Path | None) -> dict[str, Any]:
    """Sizes, sites and settings, for the page's choices."""
    trained, run = served.trained, served.trained.run
    model, rates = run.model, run.dropout.rates()
    return {
        "id": served.name,
        "parameters": model.n_parameters(trained.tokenizer.vocab_size),
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "mlp_width": model.mlp_width,
        "context_length": trained.context_length,
        "vocab_size": trained.tokenizer.vocab_size,
        "step": trained.step,
        "tokenizer": run.tokenizer.kind,
        "text": served.text or known_text(trained, directory),
        "sample": run.sample.model_dump(mode="json", exclude={"interval", "prompts"}),
        "dropout": any(rates.values()),
        "sites": [
            {
                "site": name,
                "tensor": ", ".join(kind.tensor),
                "mask": ", ".join(kind.mask),
                "rate": rates[name],
                "granularities": ["element", "locked"] if kind.by_feature else ["element"],
            }
            for name, kind in SITES.items()
        ],
        "network": network(rates, model.n_layer),
    }


def known_text(trained: Trained, directory: Path | None) -> str:
    """A few words that the model's tokenizer knows: of its validation text, else its own."""
    text = ""
    if directory is not None and (directory / "look.json").is_file():
        text = str(read_json(directory / "look.json", []).get("text", ""))
    elif directory is not None:
        samples = sorted((directory / "samples").glob("step-*.txt"))
        text = read_text(samples[-1], []).strip() if samples else ""
    try:
        ids = trained.tokenizer.encode(text)[: min(MOST_SHOWN, trained.context_length - 1)]
        return trained.tokenizer.decode(ids)
    except UserError:
        return ""


def make_look(served: ServedModel, directory: Path | None, asked: Look) -> Callable[[], Any]:
    """What /api/look answers, to be called in the engine's thread."""
    planned = {} if directory is None else read_json(directory / "plan.json", [])
    max_steps = served.trained.run.train.max_steps or planned.get("steps") or 0
    given = asked.model_dump(exclude={"model", "text"})

    def find() -> dict[str, Any]:
        found = look(served.trained, asked.text, max_steps=max_steps, **given)
        drawn_there = {**found, "picked": None}  # the page draws what is picked itself
        found["figures"] = [figure._asdict() for figure in figures_of(drawn_there)]
        for site in found["sites"]:
            site |= {"tensor": ", ".join(site["tensor"]), "mask": ", ".join(site["mask"])}
        drawn = ("attention", "context", "locked")
        return {name: value for name, value in found.items() if name not in drawn}

    return find


def make_without(served: ServedModel, asked: Without) -> Callable[[], Any]:
    """What /api/without answers, to be called in the engine's thread."""
    heads, neurons = ([(a, b) for a, b in places] for places in (asked.heads, asked.neurons))
    return partial(
        measure_without,
        served.trained,
        asked.text,
        heads,
        neurons,
        asked.layers,
        asked.fill,
        seed=asked.seed,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
    )

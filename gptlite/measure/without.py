"""A text without some heads, neurons and layers at once: its loss, and how the model goes on.

A unit that is gone hands on its mean over the tokens of this very text (with nothing gone), or
zero. `knockout` and `importance` measure over much text; this is for one text and for the eye.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlite.config.reader import lay_sample_options
from gptlite.config.run import SampleConfig
from gptlite.core.generate import Generation, encode_prompt, halve
from gptlite.core.language_model import LanguageModel
from gptlite.core.model import GPT
from gptlite.data.batches import IGNORED, Batch
from gptlite.errors import ConfigError
from gptlite.measure.units import ABLATIONS, KINDS, Subject, n_units, remove_units
from gptlite.words import count

Gone = dict[str, Tensor]
"""Of each kind of which something is gone, a mask (1, N) over its units."""


def measure_without(
    trained: LanguageModel,
    text: str,
    heads: Sequence[tuple[int, int]] = (),
    neurons: Sequence[tuple[int, int]] = (),
    layers: Sequence[int] = (),
    fill: str = "mean",
    *,
    seed: int = 1337,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Nats per token of a text and its continuation, whole and without all these units together.

    Heads and neurons are (layer, number). Seed and options of both continuations are the same;
    those that are not given are the run's. The model is left as it is, hooks included: all is done
    on copies of its modules. Raises ConfigError for units, a text or options that there are not.
    """
    if fill not in ABLATIONS:
        raise ConfigError(f"fill: {fill}: give {' or '.join(ABLATIONS)}")
    ids = read_text(trained, text)
    model = copy_modules(trained.model)
    gone = masks_of_units(
        model, {"head": heads, "neuron": neurons, "layer": [(n, 0) for n in layers]}
    )
    wanted = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options = lay_sample_options(trained.run.sample, wanted)
    subject = Subject(model, trained.run, as_batch(ids))
    fills = {kind: fills_of(subject, kind, fill) for kind in gone}
    with remove_all(model, gone, fills):
        nats = subject.row_nats("head", torch.zeros(1, n_units(model, "head"), dtype=torch.bool))
    writer = model
    if trained.run.dtype == "bfloat16":  # generates with its matrices in that, as `gptlite.load`
        writer = copy.deepcopy(model)
        halve(writer)
    with remove_all(writer, gone, fills):
        without = continue_text(trained, writer, text, options, seed)
    return {
        "loss": float(nats.sum() / subject.n_targets.sum()),
        "loss_whole": subject.loss,
        "tokens": len(ids) - 1,
        "text": without,
        "text_whole": continue_text(trained, writer, text, options, seed),
    }


def read_text(trained: LanguageModel, text: str) -> list[int]:
    """Raises ConfigError for a text that has no token to predict, or more than the context."""
    documents, most = trained.run.data.layout == "documents", trained.context_length
    ids = encode_prompt(trained.tokenizer, text, documents, place="text") if text else []
    if not 2 <= len(ids) <= most:
        raise ConfigError(f"text: {count(len(ids), 'token')}; give 2 to {most}")
    return ids


def as_batch(ids: list[int]) -> Batch:
    """One row that reads every token and is asked for all but the first."""
    return Batch(np.array([ids]), np.array([[*ids[1:], IGNORED]]), None)


def copy_modules(model: GPT) -> GPT:
    """The same network with hooks and modes of its own, over the same weights."""
    kept = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, kept).eval()


def masks_of_units(model: GPT, units: dict[str, Sequence[tuple[int, int]]]) -> Gone:
    """Of (layer, number) of each kind. Raises ConfigError for units that there are not."""
    n_layer = model.config.n_layer
    device, gone = model.token_embedding.weight.device, {}
    for kind, named in units.items():
        if not named:
            continue
        n = n_units(model, kind) // n_layer
        mask = torch.zeros(1, n_layer * n, dtype=torch.bool, device=device)
        for layer, number in named:
            if not (0 <= layer < n_layer and 0 <= number < n):
                inside = "" if kind == "layer" else f" of {kind}s 0 to {n - 1}"
                asked = f"{layer}" if kind == "layer" else f"[{layer}, {number}]"
                has = f"the model has layers 0 to {n_layer - 1}{inside}"
                raise ConfigError(f"{kind}s: {asked}: {has}")
            mask[0, layer * n + number] = True
        gone[kind] = mask
    return gone


def fills_of(subject: Subject, kind: str, fill: str) -> list[Tensor]:
    """What each place of a kind hands on for units that are gone."""
    if fill == "mean":
        return subject.means(kind)
    return [torch.zeros(()) for _ in KINDS[kind](subject.model)]


@contextmanager
def remove_all(model: GPT, gone: Gone, fills: dict[str, list[Tensor]]) -> Iterator[None]:
    """Inside, the model does without units of several kinds."""
    with ExitStack() as stack:
        for kind, mask in gone.items():
            stack.enter_context(remove_units(list(KINDS[kind](model)), mask, fills[kind]))
        yield


def continue_text(
    trained: LanguageModel, model: GPT, text: str, options: SampleConfig, seed: int
) -> str:
    """What `gptlite generate` writes after the text, with this model."""
    generation = Generation(
        model,
        trained.tokenizer,
        [text],
        options,
        seed=seed,
        documents=trained.run.data.layout == "documents",
        context=trained.context_length,
        unseen=trained.unseen,
    )
    return "".join(piece.text for piece in generation.pieces())

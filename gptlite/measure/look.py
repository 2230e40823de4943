"""One sentence through a real model, with everything that dropout lets fall on the way.

The masks are those of training, bit for bit: of row 0 of an update, by seed, step, site, layer and
head. What comes out is numbers, texts and lists, for the terminal, the pages and look.json.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlite.config.dropout import SITES, DropoutConfig
from gptlite.config.run import ModelConfig
from gptlite.core.dropout import Dropout, dropouts, set_strength, strength_at
from gptlite.core.generate import encode_prompt
from gptlite.core.language_model import LanguageModel
from gptlite.core.masks import mask_keys, sample_keys
from gptlite.core.model import GPT, Block
from gptlite.errors import ConfigError

MOST_TOKENS = 64
"""Of a text that is looked at; squares of more are no picture."""
MOST_FEATURES = 64
"""Of each token that are shown."""
PADDING = 2
"""Rows of padding, where padding is shown."""
SHOWN = ("embedding", "attention_weights", "attention_context", "mlp_output")
"""Sites that a chosen rate is tried at, beside those of the run."""
LIKELY = 5
"""Next tokens that are named."""


class Passed(NamedTuple):
    """What passed a site."""

    before: Tensor
    after: Tensor


def look(
    trained: LanguageModel,
    text: str,
    *,
    layer: int = 0,
    head: int = 0,
    step: int = 0,
    rate: float | None = None,
    max_steps: int = 0,
) -> dict[str, Any]:
    """What each site lets fall of this text; `rate` tries a rate instead of the run's.

    Raises ConfigError for a layer, head or text that there is not, and where the run's masks are
    torch's own, which nobody knows afterwards.
    """
    ids = read_ids(trained, text)
    check_place(trained.run.model, layer, head)
    dropout = chosen_dropout(trained, rate)
    strength = 1.0
    if rate is None and max_steps:
        strength = strength_at(min(step, max_steps), max_steps, dropout.schedule)
    model = copy_with(trained, dropout, strength)
    samples = sample_keys(trained.run.seed, step, np.array([0]))
    passed, logits = run_with(model, ids, samples, layer)
    plain, plain_logits = run_with(model.eval(), ids, None, layer)
    modules = {module.site: module for module in sites_of(model, layer)}
    return {
        "text": text,
        "tokens": [trained.tokenizer.decode([i]) for i in ids[0].tolist()],
        **{"layer": layer, "head": head, "step": step, "seed": trained.run.seed},
        "rate": rate,
        "strength": strength,
        "attention": attention_of(passed, head),
        "context": context_of(passed),
        "sites": [
            about_site(modules[site], passed[site])
            for site in SITES
            if site in passed and modules[site].p > 0
        ],
        "locked": locked_beside(modules["attention_context"], passed, samples),
        "padding": padded(model, ids, samples, layer),
        "training": outcome(trained, logits, ids),
        "evaluation": outcome(trained, plain_logits, ids),
        "evaluation_drops": sum(differ(of_site) for of_site in plain.values()),
    }


def read_ids(trained: LanguageModel, text: str) -> Tensor:
    """(1, T) ids. Raises ConfigError."""
    documents = trained.run.data.layout == "documents"
    ids = encode_prompt(trained.tokenizer, text, documents, place="TEXT") if text else []
    most = min(trained.context_length, MOST_TOKENS)
    if not 2 <= len(ids) <= most:
        raise ConfigError(f"TEXT: {len(ids)} tokens; give 2 to {most}")
    return torch.tensor([ids])


def check_place(model: ModelConfig, layer: int, head: int) -> None:
    """Raises ConfigError for a layer or head that the model does not have."""
    for name, value, n in (("layer", layer, model.n_layer), ("head", head, model.n_head)):
        if not 0 <= value < n:
            raise ConfigError(f"--{name} {value}: the model has {name}s 0 to {n - 1}")


def chosen_dropout(trained: LanguageModel, rate: float | None) -> DropoutConfig:
    """The run's dropout, or its sites and those of SHOWN at this rate. Raises ConfigError."""
    own = trained.run.dropout
    if rate is None:
        if native := own.native_sites("math"):
            raise ConfigError(
                f"dropout.masks: native at {', '.join(native)}: nobody knows which fell; "
                "--rate 0.5 shows what keyed masks would do"
            )
        return own
    live = {site for site, at in own.rates().items() if at > 0}
    sites = {site: rate for site in SITES if site in live.union(SHOWN)}
    return DropoutConfig.model_validate({"preset": "none", "sites": sites})


def copy_with(trained: LanguageModel, dropout: DropoutConfig, strength: float) -> GPT:
    """The same network on the CPU with this dropout, in training, by plain matrix products."""
    model, plan = copy.deepcopy(trained.model).cpu().float(), dropout.plan()
    n_layer = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.attention.kernel = "math"
        for module in sites_of(model, layer):
            module.plan, module.native = plan[module.site], False
            module.rate = module.plan.rate_in(layer, n_layer)
            module.by_position = "T" in module.kind.mask and not module.plan.locked
    set_strength(model, strength)
    return model.train()


@contextmanager
def watching(model: GPT, layer: int) -> Iterator[dict[str, Passed]]:
    """What passes each site of a layer, and those in none, by name."""
    found: dict[str, Passed] = {}

    def note(module: Dropout, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        found.setdefault(module.site, Passed(arguments[0].detach(), out.detach()))

    hooks = [site.register_forward_hook(note) for site in sites_of(model, layer)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def sites_of(model: GPT, layer: int) -> list[Dropout]:
    """The modules of one layer, and those in none."""
    inside = dropouts(model.blocks[layer])
    others = {id(module) for block in model.blocks for module in dropouts(block)}
    return [*inside, *(module for module in dropouts(model) if id(module) not in others)]


@torch.no_grad()
def run_with(
    model: GPT, ids: Tensor, samples: Tensor | None, layer: int, real: Tensor | None = None
) -> tuple[dict[str, Passed], Tensor]:
    """What passed the sites, and the logits (T, V)."""
    with watching(model, layer) as found:
        logits = model(ids, real, samples=samples)[0]
    return found, logits


def about_site(module: Dropout, passed: Passed) -> dict[str, Any]:
    """A site's rate now, its scale, the share that fell, and numbers before and after."""
    kind = module.kind
    shape = kind.locked if module.plan.locked else kind.mask
    alive = passed.before != 0
    fell = alive & (passed.after == 0)
    kept = alive & ~fell
    scale = (passed.after[kept] / passed.before[kept]).median() if bool(kept.any()) else None
    return {
        "site": module.site,
        "tensor": kind.tensor,
        "mask": shape,
        "shape": list(passed.before.shape),
        "rate": module.p,
        "scale": None if scale is None else float(scale),
        "share": float(fell.sum() / alive.sum()) if bool(alive.any()) else 0.0,
        "before": first_row(passed.before),
        "after": first_row(passed.after),
    }


def first_row(values: Tensor) -> list[float]:
    """The last position of a tensor, its first numbers."""
    return [float(x) for x in values[0].flatten(0, -2)[-1][:8]]


def attention_of(passed: dict[str, Passed], head: int) -> dict[str, Any]:
    """T × T weights of a head, before and after, and the sums of their rows."""
    before, after = (tensor[0, head] for tensor in passed["attention_weights"])
    return {
        "before": before.tolist(),
        "after": after.tolist(),
        "row_sums": [before.sum(-1).tolist(), after.sum(-1).tolist()],
    }


def context_of(passed: dict[str, Passed]) -> dict[str, Any]:
    """T × C context vectors before and after, as far as they are shown."""
    before, after = (tensor[0, :, :MOST_FEATURES] for tensor in passed["attention_context"])
    width = passed["attention_context"].before.shape[-1]
    return {"before": before.tolist(), "after": after.tolist(), "width": width}


def locked_beside(
    module: Dropout, passed: dict[str, Passed], samples: Tensor
) -> dict[str, Any] | None:
    """What falls of the context vectors value by value, and with one mask for all positions."""
    if module.p == 0:
        return None
    ones = torch.ones_like(passed["attention_context"].before)
    keys = mask_keys(samples, torch.arange(ones.shape[1])[None], None)
    found, by_position = {}, module.by_position
    for name, each in (("element", True), ("locked", False)):
        module.by_position = each
        found[name] = (module.train()(ones, keys)[0, :, :MOST_FEATURES] == 0).tolist()
    module.by_position = by_position
    return found


def padded(model: GPT, ids: Tensor, samples: Tensor, layer: int) -> dict[str, Any] | None:
    """The text behind padding: what falls of it is the same, and padding is left as it is."""
    long = torch.cat([ids.new_zeros(1, PADDING), ids], dim=1)
    if long.shape[1] > model.config.context_length:
        return None
    real = torch.arange(long.shape[1])[None] >= PADDING
    with_padding, _ = run_with(model.train(), long, samples, layer, real)
    plain, _ = run_with(model, ids, samples, layer)
    fallen, alone = (fallen_of(p["embedding"]) for p in (with_padding, plain))
    return {
        "rows": PADDING,
        "fallen": fallen[0, :, :MOST_FEATURES].tolist(),
        "padding_untouched": not bool(fallen[0, :PADDING].any()),
        "text_the_same": torch.equal(fallen[0, PADDING:], alone[0]),
    }


def fallen_of(passed: Passed) -> Tensor:
    return (passed.after == 0) & (passed.before != 0)


def differ(passed: Passed) -> int:
    """Values that a site changed."""
    return int((passed.before != passed.after).sum())


def outcome(trained: LanguageModel, logits: Tensor, ids: Tensor) -> dict[str, Any]:
    """Nats per token of the text, and the tokens that are likeliest to follow it."""
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    probabilities, tokens = logits[-1].softmax(-1).topk(min(LIKELY, logits.shape[-1]))
    named = [trained.tokenizer.decode([i]) for i in tokens.tolist()]
    return {
        "loss": float(loss),
        "next": [[t, p] for t, p in zip(named, probabilities.tolist(), strict=True)],
    }

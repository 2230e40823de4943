"""One sentence through a real model, with everything that dropout lets fall on the way.

The masks are those of training, bit for bit: of row 0 of an update, by seed, step, site, layer and
head. What comes out is numbers, texts and lists, for the terminal, the pages and look.json.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptlite.config.dropout import SITES, DropoutConfig, Kind
from gptlite.config.run import ModelConfig
from gptlite.core.dropout import Dropout, dropouts, set_strength, strength_at
from gptlite.core.generate import encode_prompt
from gptlite.core.language_model import LanguageModel
from gptlite.core.masks import mask_keys, sample_keys
from gptlite.core.model import GPT, Block
from gptlite.errors import ConfigError
from gptlite.measure.marks import marks_of
from gptlite.words import count, did_you_mean

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
COMPANY = 4
"""Rows of the batch in which a text is looked at once more, among others."""


class Passed(NamedTuple):
    """What passed a site."""

    before: Tensor
    after: Tensor


Watched = Mapping[Dropout, Passed]
"""What passed each module in one forward pass; modules that do not act may be left out."""


def look(
    trained: LanguageModel,
    text: str,
    *,
    layer: int = 0,
    head: int = 0,
    step: int = 0,
    rate: float | None = None,
    max_steps: int = 0,
    site: str | None = None,
    granularity: str | None = None,
    split: bool = False,
) -> dict[str, Any]:
    """What each site lets fall of this text; `rate` tries a rate instead of the run's.

    `site` is looked at closely (`picked`); with a rate nothing drops but this site, by its own
    `granularity` or the one that is given. `split` also asks whether the same falls of this row in
    a larger batch (`split_equal`).

    Raises ConfigError for a layer, head, site or text that there is not, and where the run's masks
    are torch's own, which nobody knows afterwards.
    """
    ids = read_ids(trained, text)
    check_place(trained.run.model, layer, head)
    dropout = chosen_dropout(trained, rate, site, granularity)
    strength = 1.0
    if rate is None and max_steps:
        strength = strength_at(min(step, max_steps), max_steps, dropout.schedule)
    model = copy_with(trained, dropout, strength)
    samples = sample_keys(trained.run.seed, step, np.arange(COMPANY))
    watched, logits = run_with(model, ids, samples[:1])
    equal = falls_alike(model, ids, samples, watched) if split else None
    plain, plain_logits = run_with(model.eval(), ids, None)
    modules = {module.site: module for module in sites_of(model, layer)}
    passed = {name: watched[module] for name, module in modules.items() if module in watched}
    tokens = [trained.tokenizer.decode([i]) for i in ids[0].tolist()]
    return {
        "text": text,
        "tokens": tokens,
        **{"layer": layer, "head": head, "step": step, "seed": trained.run.seed},
        "rate": rate,
        "strength": strength,
        "attention": attention_of(passed, head),
        "context": context_of(passed),
        "sites": [
            about_site(modules[name], passed[name])
            for name in SITES
            if name in passed and modules[name].p > 0
        ],
        "picked": None if site is None else pick(model, watched, modules[site], head, tokens),
        "split_equal": equal,
        "locked": locked_beside(modules["attention_context"], passed, samples[:1]),
        "padding": padded(model, ids, samples[:1]),
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
        raise ConfigError(f"TEXT: {count(len(ids), 'token')}; give 2 to {most}")
    return torch.tensor([ids])


def check_place(model: ModelConfig, layer: int, head: int) -> None:
    """Raises ConfigError for a layer or head that the model does not have."""
    for name, value, n in (("layer", layer, model.n_layer), ("head", head, model.n_head)):
        if not 0 <= value < n:
            raise ConfigError(f"--{name} {value}: the model has {name}s 0 to {n - 1}")


def chosen_dropout(
    trained: LanguageModel, rate: float | None, site: str | None, granularity: str | None
) -> DropoutConfig:
    """The run's dropout; or at this rate a site alone, else the run's sites and those of SHOWN.

    Raises ConfigError.
    """
    check_choice(rate, site, granularity)
    own = trained.run.dropout
    if rate is None and (native := own.native_sites("math")):
        raise ConfigError(
            f"dropout.masks: native at {', '.join(native)}: nobody knows which fell; "
            "--rate 0.5 shows what keyed masks would do"
        )
    if site is None:
        if rate is None:
            return own
        live = {name for name, at in own.rates().items() if at > 0}
        sites: dict[str, Any] = {name: rate for name in SITES if name in live.union(SHOWN)}
        return DropoutConfig.model_validate({"preset": "none", "sites": sites})
    if rate is not None:
        by_run = "locked" if own.plan()[site].locked else None
        sites = {site: {"rate": rate, "granularity": granularity or by_run}}
        return DropoutConfig.model_validate({"preset": "none", "sites": sites})
    if granularity is None:
        return own
    changed = own.site(site).model_copy(update={"granularity": granularity})
    return own.model_copy(update={"sites": own.sites.model_copy(update={site: changed})})


def check_choice(rate: float | None, site: str | None, granularity: str | None) -> None:
    """Raises ConfigError for a rate, site or granularity that there is not."""
    if rate is not None and not 0 <= rate < 1:
        raise ConfigError(f"--rate {rate:g}: give 0 or more, below 1")
    if site is not None and site not in SITES:
        hint = did_you_mean(site, SITES) or f"; there are {', '.join(SITES)}"
        raise ConfigError(f"--site {site}: no such site{hint}")
    if granularity is None:
        return
    if granularity not in ("element", "locked"):
        raise ConfigError(f"--granularity {granularity}: give element or locked")
    if site is None:
        raise ConfigError("--granularity: is of one site; name it with --site")
    if not SITES[site].by_feature:
        values = ", ".join(name for name, kind in SITES.items() if kind.by_feature)
        raise ConfigError(
            f"--granularity {granularity}: {site} drops whole units; there is a choice at {values}"
        )


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
def watching(model: GPT) -> Iterator[dict[Dropout, Passed]]:
    """What passes each site of each layer, at its first call."""
    found: dict[Dropout, Passed] = {}

    def note(module: Dropout, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        found.setdefault(module, Passed(arguments[0].detach(), out.detach()))

    hooks = [module.register_forward_hook(note) for module in dropouts(model)]
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
    model: GPT, ids: Tensor, samples: Tensor | None, real: Tensor | None = None
) -> tuple[Watched, Tensor]:
    """What passed the sites, and the logits (T, V) of row 0."""
    with watching(model) as found:
        logits = model(ids, real, samples=samples)[0]
    return found, logits


def falls_alike(model: GPT, ids: Tensor, samples: Tensor, alone: Watched) -> bool:
    """Whether of the text as row 0 of a batch the same falls, at all sites of all layers, as alone.

    The other rows are the text turned round by a token each.
    """
    rows = torch.cat([ids.roll(row, dims=1) for row in range(len(samples))])
    together, _ = run_with(model.train(), rows, samples)
    return all(same_fell(alone[module], together[module]) for module in alone if module.p > 0)


def same_fell(alone: Passed, together: Passed) -> bool:
    """Of row 0, wherever something was there both times: sums of a larger batch round otherwise."""
    there = (alone.before[0] != 0) & (together.before[0] != 0)
    fallen = ((passed.after[0] == 0) & there for passed in (alone, together))
    return torch.equal(*fallen)


def about_site(module: Dropout, passed: Passed) -> dict[str, Any]:
    """A site's rate now, its scale, the share that fell, and numbers before and after.

    Of hidden keys nothing is multiplied: the softmax makes the others sum to one.
    """
    kind = module.kind
    alive = passed.before != 0
    fell = alive & (passed.after == 0)
    kept = alive & ~fell
    scaled = bool(kept.any()) and module.site != "key"
    return {
        "site": module.site,
        "tensor": kind.tensor,
        "mask": kind.locked if module.plan.locked else kind.mask,
        "shape": list(passed.before.shape),
        "rate": module.p,
        "scale": float((passed.after[kept] / passed.before[kept]).median()) if scaled else None,
        "share": float(fell.sum() / alive.sum()) if bool(alive.any()) else 0.0,
        "before": first_row(passed.before),
        "after": first_row(passed.after),
    }


def pick(
    model: GPT, watched: Watched, module: Dropout, head: int, tokens: list[str]
) -> dict[str, Any]:
    """One site from near: a row of marks for each token, or for each head or layer where those
    drop whole. `columns` are tokens, or none where they are features; `rates` those of the rows,
    if these are layers."""
    site, kind, every = module.site, module.kind, [module]
    if site == "layer":
        every = [other for other in dropouts(model) if other.site == site]
    passed = [watched.get(one) or nobody_hidden(model, len(tokens)) for one in every]
    joined = Passed(*(torch.cat(tensors) for tensors in zip(*passed, strict=True)))
    about = about_site(module, joined)
    named = {"head": model.config.n_head, "layer": len(every)}
    rows = [f"{site} {i}" for i in range(named[site])] if site in named else tokens
    before, after = (picture(tensor, kind, head) for tensor in joined)
    if site == "key":  # a query always sees itself
        before, after = (tensor + torch.eye(len(tokens)) for tensor in (before, after))
    return {
        **{name: about[name] for name in ("site", "scale", "share", "rate")},
        "rates": [one.p for one in every],
        "tensor": letters(about["tensor"]),
        "mask": letters(about["mask"]),
        "shape": list(passed[0].before.shape),
        "rows": rows,
        "columns": tokens if site in named or "S" in kind.tensor else [],
        "marks": marks_of(before.tolist(), after.tolist()),
    }


def nobody_hidden(model: GPT, T: int) -> Passed:
    """What passes the site `key` where it does not act, and so is not called."""
    others = torch.ones(1, model.config.n_head, T, T).tril(-1)
    return Passed(others, others)


def picture(tensor: Tensor, kind: Kind, head: int) -> Tensor:
    """Two dimensions of what passed a site: T × T of a head, units × T, or T × some features."""
    if kind.mask.endswith("1"):
        units = tensor.abs().sum(-1)  # whole vectors drop
        return units.T if kind.mask == "BT1" else units.flatten(0, -2)
    return tensor[0, head] if "H" in kind.tensor else tensor[0, :, :MOST_FEATURES]


def letters(dimensions: str) -> str:
    """As a reader knows them: a text by itself has as many keys as queries, joined heads are C."""
    return ", ".join(dimensions.replace("S", "T").replace("Z", "C"))


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


def padded(model: GPT, ids: Tensor, samples: Tensor) -> dict[str, Any] | None:
    """The text behind padding: what falls of it is the same, and padding is left as it is."""
    long = torch.cat([ids.new_zeros(1, PADDING), ids], dim=1)
    if long.shape[1] > model.config.context_length:
        return None
    real = torch.arange(long.shape[1])[None] >= PADDING
    with_padding, _ = run_with(model.train(), long, samples, real)
    plain, _ = run_with(model, ids, samples)
    fallen, alone = (fallen_of(p[model.drop_embedding]) for p in (with_padding, plain))
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

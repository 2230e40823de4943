"""What the values of a config may not be together; nothing is allocated to find out."""

import os
from collections.abc import Iterator

from gptlite.config.dropout import RATES, SITES, DropoutConfig, SiteConfig
from gptlite.config.run import ASSUMED_VOCABULARY, ModelConfig, RunConfig

MOST_PARAMETERS = 10**12


def training_needs(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, problem) for what a run must have to be trained, and a model made elsewhere lacks."""
    train = run.train
    if not run.sources or not all(run.sources):
        yield "data.source", "required: a file, glob, folder, URL, python-docs or verses"
    if (train.max_steps is None) == (train.epochs is None):
        have = "neither" if train.epochs is None else "both"
        yield (
            "train.max_steps",
            f"give exactly one of train.max_steps and train.epochs (got {have})",
        )


def contradictions(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, problem) for all that single fields cannot know; nothing is allocated to find out."""
    model, train, optim = run.model, run.train, run.optim
    yield from bad_sources(run)
    if model.head_dim is None and model.n_embd % model.n_head:
        why = f"{model.n_embd} is not divisible by model.n_head {model.n_head}"
        yield "model.n_embd", why
    elif model.position == "rope" and model.head_width % 2:
        key = "model.n_embd" if model.head_dim is None else "model.head_dim"
        yield key, f"position rope needs an even head width (got {model.head_width})"
    if model.n_head % model.kv_heads:
        why = f"{model.kv_heads} does not divide model.n_head {model.n_head}"
        yield "model.n_kv_head", why
    if optim.min_lr > optim.lr:
        yield "optim.min_lr", f"{optim.min_lr} is above optim.lr {optim.lr}"
    if train.max_steps is not None and optim.warmup_steps >= train.max_steps:
        why = f"{optim.warmup_steps} is not below train.max_steps {train.max_steps}"
        yield "optim.warmup_steps", why
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > train.batch_size:
        why = f"{train.micro_batch_size} is above train.batch_size {train.batch_size}"
        yield "train.micro_batch_size", why
    if run.data.train_from == "seed" and run.data.train_tokens is None:
        yield "data.train_from", "seed means nothing without data.train_tokens: all text is taken"
    yield from needs_known_end(run)
    for key, problem in dropout_contradictions(run.dropout, model.n_layer):
        yield f"dropout.{key}", problem
    yield from fused_cannot_drop(run)
    yield from bad_paths(run)
    yield from too_large(run)


def needs_known_end(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What moves over a whole run, where only a clock knows how long that is."""
    if run.train.max_minutes is None:
        return
    why = "has to know the last update, which train.max_minutes decides; {} or leave that out"
    if run.optim.schedule not in ("wsd", "constant"):
        yield "optim.schedule", f"{run.optim.schedule} {why.format('set wsd')}"
    if run.optim.weight_decay_schedule == "linear":
        yield "optim.weight_decay_schedule", f"linear {why.format('set with_lr')}"
    schedule = run.dropout.schedule
    if (schedule.mode, schedule.shape) != ("standard", "constant"):
        moves = f"{schedule.mode} {schedule.shape}"
        yield "dropout.schedule", f"{moves} {why.format('set standard and constant')}"
    if run.train.average == "ema" and run.train.average_half_life < 1:
        share = f"a share of the run ({run.train.average_half_life:g})"
        yield "train.average_half_life", f"{share} {why.format('give updates')}"


def bad_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    named = [("source", source) for source in run.sources]
    named += [("val_source", source) for source in run.val_sources]
    for key, source in named:
        if source.startswith(("http://", "ftp://")):
            yield f"data.{key}", f"is not encrypted on its way; give https:// (got {source!r})"
        elif source.startswith("https://") and key == "val_source":
            yield (
                "data.val_source",
                f"a download needs a digest; fetch it, give the file ({source})",
            )
        elif source.startswith("https://") and run.data.sha256 is None:
            yield "data.sha256", f"required for a download ({source})"
    if run.data.sha256 is not None and len(run.sources) > 1:
        yield "data.sha256", "names one file, but data.source lists several"
    if run.val_sources and run.data.split_by != "auto":
        yield "data.split_by", "nothing is split beside data.val_source; leave it out"
    if run.val_sources and not all(run.val_sources):
        yield "data.val_source", "is empty; give a file, glob or folder, or leave it out"


def fused_cannot_drop(run: RunConfig) -> Iterator[tuple[str, str]]:
    """A fused kernel that is asked for by name, but cannot drop attention weights as asked."""
    dropout = run.dropout
    if dropout.rate == "auto":  # not resolved yet; it is asked again when it is
        dropout = dropout.model_copy(update={"rate": None})
    rate = dropout.rates()["attention_weights"]
    if run.attention != "sdpa" or rate == 0:
        return
    if dropout.masks == "keyed" or run.device in ("cpu", "mps"):
        lacks = "keyed masks" if dropout.masks == "keyed" else f"dropout on {run.device}"
        why = f"no fused kernel has {lacks} for dropout.sites.attention_weights (rate {rate:g})"
        yield "attention", f"sdpa: {why}; set math or auto"


def bad_paths(run: RunConfig) -> Iterator[tuple[str, str]]:
    paths = {"out_dir": run.out_dir, "init_from": run.init_from}
    paths["data.cache_dir"] = run.data.cache_dir
    for key, path in paths.items():
        if path is not None and "\0" in path:
            yield key, "contains a NUL character"
    directory = os.path.abspath(run.out_dir or "run")
    if directory == os.path.dirname(directory):
        yield "out_dir", "the root folder cannot be a run directory"


def too_large(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What no machine holds; whether this one does is asked where a run is planned."""
    model = run.model
    n_parameters = model.n_parameters(ASSUMED_VOCABULARY[run.tokenizer.kind])
    if n_parameters > MOST_PARAMETERS:
        largest = largest_size(model)
        why = f"model would need {n_parameters:.1e} parameters; the most is {MOST_PARAMETERS:.0e}"
        yield f"model.{largest}", f"{why} ({largest} {getattr(model, largest)})"


def largest_size(model: ModelConfig) -> str:
    """The key that is most likely meant to be smaller."""
    sizes = ("n_layer", "n_embd", "context_length")
    return max(sizes, key=lambda name: int(getattr(model, name)))


def dropout_contradictions(dropout: DropoutConfig, n_layer: int) -> Iterator[tuple[str, str]]:
    """(key below `dropout`, problem) for all that no single field can know."""
    if dropout.preset == "none" and dropout.rate:
        yield "rate", f"{dropout.rate} has no effect: preset none has no sites"
    for name, kind in SITES.items():
        site = dropout.site(name)
        whole = f"{name} drops {'layers' if name == 'layer' else name + 's'} whole"
        if site.granularity is not None and not kind.by_feature:
            yield f"sites.{name}.granularity", f"means nothing here: {whole}"
        if site.scale is not None and name != "layer":
            yield f"sites.{name}.scale", "only layer has it"
        if site.profile is not None and not kind.per_layer:
            yield f"sites.{name}.profile", f"means nothing here: {name} is in no layer"
        elif isinstance(site.profile, tuple) and len(site.profile) != n_layer:
            why = f"has {len(site.profile)} values for model.n_layer {n_layer}"
            yield f"sites.{name}.profile", why
        elif isinstance(site.profile, tuple) and not any(site.profile):
            yield f"sites.{name}.profile", "is 0 in every layer, so that the rate reaches nothing"
        at = f"sites.{name}.rate" if isinstance(getattr(dropout.sites, name), SiteConfig) else None
        yield from inexact(at or f"sites.{name}", site.rate)
    yield from inexact("rate", None if dropout.rate == "auto" else dropout.rate)
    schedule = dropout.schedule
    if schedule.mode == "late" and schedule.until == 1:
        yield "schedule.until", "mode late until 1.0 would never drop; give a smaller fraction"
    if schedule.mode == "early" and schedule.shape == "constant" and schedule.until == 1:
        yield "schedule.until", "mode early until 1.0 would never end; give a smaller fraction"
    if schedule.mode == "standard" and schedule.shape == "constant" and schedule.until != 1:
        why = f"{schedule.until} has no effect in mode standard with shape constant"
        yield "schedule.until", why


def inexact(key: str, rate: float | None) -> Iterator[tuple[str, str]]:
    """Rates that 16 bits would turn into never or always."""
    if rate and not 0 < round(rate * RATES) < RATES:
        extreme = "never" if rate < 0.5 else "always"
        yield key, f"{rate:g} would {extreme} drop: rates are multiples of 1/{RATES}"

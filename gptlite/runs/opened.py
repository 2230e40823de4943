"""A trained run as an object: `gptlite.load`. The commands and this call the same functions.

Errors are those of the commands, as exceptions with the place (errors.py). Nothing here writes into
a run directory but `train_run`, which trains.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from gptlite.config.reader import lay_sample_options
from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.dropout import dropouts, set_strength, strength_at
from gptlite.core.evaluate import byte_lengths, eval_rows, measure
from gptlite.core.generate import Generation, encode_text, halve
from gptlite.core.masks import MaskKeys, mask_keys, sample_keys
from gptlite.core.model import GPT
from gptlite.data.batches import Documents, Layout, Stream
from gptlite.data.prepare import open_split
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError, DataError, add_step_to_errors
from gptlite.measure import suites
from gptlite.planning.audit import tensor_shape
from gptlite.runs.directory import choose_directory, existing_run
from gptlite.runs.importing import open_foreign
from gptlite.runs.origin import complete_run, load_run
from gptlite.runs.results import read_json, read_rows, read_text
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained
from gptlite.words import count

PAGE_HEIGHT = 640
"""Pixels of a report that stands in a notebook."""


class Run:
    """A trained run. `model` is the torch module in eval mode, `tokenizer` has encode and decode,
    `config` is the frozen config, `directory` where it lives (None: a model from elsewhere)."""

    def __init__(self, trained: Trained, directory: Path | None) -> None:
        self.trained, self.directory = trained, directory
        self.model: GPT = trained.model
        self.tokenizer: Tokenizer = trained.tokenizer
        self.config: RunConfig = trained.run
        self.step: int = trained.step

    def __repr__(self) -> str:
        n = self.config.model.n_parameters(self.tokenizer.vocab_size)
        where = self.directory or "from elsewhere"
        return f"<gptlite run {where}, step {self.step}, {n:,} parameters>"

    @cached_property
    def generator(self) -> GPT:
        """The model that generates: of a run in bfloat16 with its matrices in that, as a copy."""
        if self.config.dtype != "bfloat16":
            return self.model
        copied = copy.deepcopy(self.model)
        halve(copied)
        return copied

    @overload
    def generate(
        self, prompt: str = "", *, stream: Literal[False] = False, **options: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str = "", *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str = "",
        *,
        stream: bool = False,
        seed: int = 1337,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> str | Iterator[str]:
        """What follows the prompt, whole or piece by piece; the text of `gptlite generate` for the
        same seed. `options` are those of the config's section `sample`."""
        if any(not text for text in stop):
            raise ConfigError("stop: an empty text would stop at once")
        generation = Generation(
            self.generator,
            self.tokenizer,
            [prompt],
            lay_sample_options(self.config.sample, options),
            seed=seed,
            num_samples=1,
            stops=list(stop),
            documents=self.config.data.layout == "documents",
            context=self.trained.context_length,
            unseen=self.trained.unseen,
        )
        pieces = (piece.text for piece in generation.pieces())
        return pieces if stream else "".join(pieces)

    def loss(self, text: str) -> dict[str, Any]:
        """Nats per token, bits per byte and more of a text, dropout off. Raises DataError."""
        lengths = byte_lengths(self.tokenizer)
        batches = self.rows_of(text).sweep(eval_rows(self.config, self.tokenizer.vocab_size))
        with add_step_to_errors(self.step):
            found = measure(self.model, batches, self.config, lengths).report()
        return {name: found[name] for name in ("loss", "perplexity", "bits_per_byte", "targets")}

    def rows_of(self, text: str) -> Layout:
        """A text in the rows that the model reads."""
        ids = encode_text(self.tokenizer, text, "text")
        context, eot = self.trained.context_length, self.tokenizer.eot
        if self.config.data.layout == "documents":
            assert eot is not None
            return Documents(np.array([eot, *ids, eot]), context, eot)
        if len(ids) < 2:
            raise DataError(f"text: {count(len(ids), 'token')}; give at least 2")
        return Stream(np.array(ids), context)

    def evaluate(
        self, split: str = "val", suite: str | Sequence[str] = "loss", *, fast: bool = False
    ) -> dict[str, Any]:
        """Results by suite, as `gptlite eval --json` prints them; nothing is written."""
        files = partial(
            open_split, self.config, self.tokenizer, split, self.trained.state.data_digest
        )
        names = [suite] if isinstance(suite, str) else list(suite)
        effort = suites.FAST if fast else suites.FULL
        return suites.run_suites(self.trained, split, names, files, effort=effort)

    def dropout_masks(self, text: str, step: int = 0, row: int = 0) -> dict[str, list[Tensor]]:
        """What falls (True) where this text is a row of update `step`: by site, a tensor for each
        layer, in the shape of what passes there. Bit for bit the masks of training.

        Raises ConfigError for masks that torch's generator draws: nobody knows those afterwards.
        """
        ids = encode_text(self.tokenizer, text, "text")[: self.trained.context_length]
        if not ids:
            raise DataError("text: has no token")
        if native := self.config.dropout.native_sites(self.config.attention):
            raise ConfigError(
                f"dropout.masks: native at {', '.join(native)}; set keyed to see them"
            )
        samples = sample_keys(self.config.seed, step, np.array([row]))
        keys = mask_keys(samples, torch.arange(len(ids))[None], None)
        max_steps = self.config.train.max_steps or self.plan.get("steps", 0)
        strength = strength_at(
            min(step, max_steps), max(1, max_steps), self.config.dropout.schedule
        )
        return masks_of(self.model, self.config, keys, len(ids), strength)

    @property
    def plan(self) -> dict[str, Any]:
        """plan.json: what was planned."""
        return {} if self.directory is None else read_json(self.directory / "plan.json", [])

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, ready for pandas."""
        return [] if self.directory is None else read_rows(self.directory / "metrics.jsonl", [])

    def _repr_html_(self) -> str:
        """The report of the run, in a notebook."""
        page = "" if self.directory is None else read_text(self.directory / "report.html", [])
        if not page:
            return f"<code>{escape(repr(self))}</code>"
        frame = f'style="width:100%;height:{PAGE_HEIGHT}px;border:0"'
        return f'<iframe srcdoc="{escape(page)}" {frame}></iframe>'


def masks_of(
    model: GPT, config: RunConfig, keys: MaskKeys, length: int, strength: float
) -> dict[str, list[Tensor]]:
    """What each site drops of ones at this strength, in a network that is left as it was."""
    short = config.model.model_copy(update={"context_length": length})
    run = config.model_copy(update={"model": short})
    found: dict[str, list[Tensor]] = {}
    sites = [module for module in dropouts(model) if module.rate > 0]
    modes = [(module, module.training, module.p) for module in sites]
    set_strength(model, strength)
    try:
        for module in sites:
            ones = torch.ones(tensor_shape(run, module.kind.tensor, 1))
            kept = module.train()(ones, keys)
            found.setdefault(module.site, []).append(kept == 0)
    finally:
        for module, mode, rate in modes:
            module.train(mode).p = rate
    return found


def load(where: str | Path = "latest", checkpoint: str = "best") -> Run:
    """A run directory, `latest` under runs/, a checkpoint of a run, or a directory of Hugging
    Face's. Raises ConfigError, CheckpointError."""
    path = Path(where)
    if str(where) == "latest" and not path.exists():
        directory = existing_run(None)
    elif path.parent.name == "checkpoints":
        directory, checkpoint = existing_run(str(path.parent.parent)), path.name
    elif (path / "config.json").is_file() and not (path / "config.yaml").exists():
        return Run(open_foreign(path), None)
    else:
        directory = existing_run(str(path))
    return Run(load_trained(directory, checkpoint), directory)


def train_run(
    config: Mapping[str, Any] | str | Path | Sequence[str | Path],
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
) -> Run:
    """Train what a config says (a mapping, a file, a shipped name, or several) and open it.

    The directory is `out_dir`, the config's, or a new one under runs/; `resume` goes on in it.
    """
    if isinstance(config, Mapping):
        run, names = complete_run(Document(copy.deepcopy(dict(config)))), ["run"]
    else:
        files = [config] if isinstance(config, str | Path) else config
        names = [str(file) for file in files]
        run = load_run(names)
    chosen = run.out_dir if out_dir is None else str(out_dir)
    directory, resumes = choose_directory(chosen, names, "auto" if resume else None)
    train(run, directory, resume=resumes)
    return Run(load_trained(directory, "best"), directory)

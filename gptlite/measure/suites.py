"""What `gptlite eval` can measure: each suite is a function from a Measurement to plain numbers.

Suites that remove units or average passes work on some rows, spread over the split: `Effort` says
on how many. A number with its 95 % interval is {"value", "low", "high"}.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from gptlite import storage
from gptlite.core.dropout import planned_sites
from gptlite.core.evaluate import (
    TRAIN_SUBSET_ROWS,
    Measured,
    byte_lengths,
    eval_rows,
    measure,
)
from gptlite.core.language_model import LanguageModel
from gptlite.core.world import ALONE, World, unlike_first
from gptlite.data.batches import IGNORED, Batch, Layout
from gptlite.data.token_files import TokenFiles
from gptlite.errors import ConfigError, DataError, add_step_to_errors
from gptlite.measure import calibration, importance, knockout
from gptlite.measure.intervals import Floats, mean_per_target
from gptlite.measure.losses import difference_of_rows, difference_on_rows, loss_bounds
from gptlite.measure.memorisation import memorisation
from gptlite.measure.units import ABLATIONS, KINDS, Subject
from gptlite.terminal import wants_bar
from gptlite.words import did_you_mean

MOST_ROWS = 4096
"""Rows of the calibration suite."""
MOST_NAME = 40
"""Characters of a source's name in the name of a file; most systems allow 255 bytes."""
T = TypeVar("T")


class Effort(NamedTuple):
    """How much work the suites do that could go on forever."""

    tokens: int
    """On which knock-outs, backup and averaged passes are measured, about."""
    ranking_tokens: int
    """On which each unit is removed alone."""
    neuron_tokens: int
    """The same for neurons, of which there are hundreds of times as many."""
    fractions: tuple[float, ...]
    n_masks: int
    """Random masks per fraction, and sets of units for the backup ratio."""
    passes: tuple[int, ...]
    """With dropout on, averaged."""
    loss_rows: int | None = None
    """On which the loss is measured, spread over the split; None: all."""
    windows: int = 256
    """Of each split that are tried for being known by heart."""


FULL = Effort(4096, 16384, 2048, (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1), 20, (1, 2, 5, 10, 20, 50))
FAST = Effort(2048, 384, 384, (0, 0.1, 0.3, 0.5, 1), 8, (1, 2, 5, 10, 20), MOST_ROWS, 64)


class Measurement:
    """A trained model and the text it is measured on; what several suites need is made once.

    A source of its own has all its text in `val`."""

    def __init__(
        self,
        trained: LanguageModel,
        split: str,
        files: Callable[[], TokenFiles],
        *,
        effort: Effort = FULL,
        dropout_active: bool = False,
        world: World = ALONE,
    ) -> None:
        self.trained = trained
        self.run = trained.run
        self.model = trained.model
        self.split = split
        self.files = cache(files)
        self.effort = effort
        self.dropout_active = dropout_active
        self.world = world

    @cached_property
    def rows(self) -> Layout:
        files = self.files()
        if ranks := unlike_first(self.world, files.digest):
            raise DataError(f"--split {self.split}: rank {ranks} has other text than rank 0")
        return files.rows(self.part, self.trained.context_length)

    @property
    def part(self) -> str:
        return self.split if self.split in ("train", "test") else "val"

    @cached_property
    def rows_at_once(self) -> int:
        return eval_rows(self.run, self.trained.tokenizer.vocab_size, self.world)

    def watch(self, work: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
        """A progress bar, where someone can see it."""
        hidden = not (self.world.first and wants_bar("auto", sys.stderr))
        return tqdm(work, name, total, leave=False, disable=hidden, file=sys.stderr)

    def sweep(self, rows: Layout, name: str, limit: int | None = None) -> Iterable[Batch]:
        """All rows, or about so many spread over them; watched."""
        n_rows = min(rows.n_swept, limit or rows.n_swept)
        batches = rows.sweep(self.rows_at_once, limit)
        return self.watch(batches, name, -(-n_rows // self.rows_at_once))

    def spread_rows(self, tokens: int, half: int | None = None) -> Batch:
        """About this many tokens in rows spread over the split; no row is in both halves."""
        n = max(6, -(-tokens // self.trained.context_length)) * (1 if half is None else 2)
        (batch,) = self.rows.sweep(n, n)
        if half is None or len(batch.inputs) == 1:
            return batch
        real = None if batch.real is None else batch.real[half::2]
        return Batch(batch.inputs[half::2], batch.targets[half::2], real)

    def parts(self, tokens: int) -> list[Batch]:
        """About this many tokens in rows spread over the split, as many at once as fit."""
        batch, at_once = self.spread_rows(tokens), self.rows_at_once
        return [batch.part(i, i + at_once) for i in range(0, len(batch.inputs), at_once)]

    @cached_property
    def subject(self) -> Subject:
        """What knock-out curves are measured on."""
        return Subject(self.model, self.run, self.spread_rows(self.effort.tokens, 0), self.watch)

    def ranking(self, kind: str) -> Subject:
        """Other text, on which each unit is removed alone and the means of units are taken."""
        effort = self.effort
        return self.ranking_on(effort.neuron_tokens if kind == "neuron" else effort.ranking_tokens)

    @cache  # noqa: B019 - lives as long as the one measurement of a command
    def ranking_on(self, tokens: int) -> Subject:
        run = self.run.model_copy(update={"dtype": "float32"})  # one neuron is less than bfloat16
        return Subject(self.model, run, self.spread_rows(tokens, 1), self.watch)

    @cache  # noqa: B019
    def fills(self, kind: str, ablation: str) -> Sequence[Tensor] | None:
        return self.ranking(kind).means(kind) if ablation == "mean" else None

    @cache  # noqa: B019
    def singles(self, kind: str, ablation: str) -> Floats:
        return self.ranking(kind).singles(kind, self.fills(kind, ablation))


def measure_loss(of: Measurement) -> dict[str, Any]:
    """Loss over the split; the generalisation gap, dropout off on both sides; and what leaving
    dropout on costs: on the training text of the gap, or if asked for on the whole split."""
    rows, counts = of.rows, of.files().counts(of.part)
    lengths = byte_lengths(of.trained.tokenizer, counts)

    def measure_rows(rows: Layout, active: bool, limit: int | None = None) -> Measured:
        batches = of.sweep(rows, "loss", limit)
        return measure(of.model, batches, of.run, lengths, dropout_active=active, world=of.world)

    limit = of.effort.loss_rows
    found = measure_rows(rows, of.dropout_active, limit)
    more: dict[str, Any] = {}
    if limit is not None and limit < rows.n_swept:
        more |= {"rows": limit, "rows_of_split": rows.n_swept}
    if "unknown_bytes" in counts:
        more["unknown_bytes"] = counts["unknown_bytes"]
    bounds = {"loss": loss_bounds(found)}
    if of.dropout_active:
        off = measure_rows(rows, False, limit)
        more |= {"loss_dropout_off": off.loss, "dropout_cost": found.loss - off.loss}
        bounds["dropout_cost"] = difference_on_rows(found, off)
    elif of.split in ("val", "test"):
        train = of.files().rows("train", of.trained.context_length)
        plain = measure_rows(train, False, TRAIN_SUBSET_ROWS)
        dropped = measure_rows(train, True, TRAIN_SUBSET_ROWS)
        more |= {
            "train_loss": plain.loss,
            "train_rows": plain.by_row.shape[1],
            "generalisation_gap": found.loss - plain.loss,
            "dropout_penalty": dropped.loss - plain.loss,
        }
        bounds["generalisation_gap"] = difference_of_rows(found, plain)
        bounds["dropout_penalty"] = difference_on_rows(dropped, plain)
    known = {name: ends for name, ends in bounds.items() if ends is not None}
    return {
        **found.report(),
        **more,
        "intervals": known,
        "dropout_active": of.dropout_active,
    }


def measure_calibration(of: Measurement) -> dict[str, Any]:
    batches = of.sweep(of.rows, "calibration", MOST_ROWS)
    return calibration.calibration(calibration.guesses(of.model, batches, of.run))


def measure_knockout(of: Measurement) -> dict[str, Any]:
    """Loss against the fraction removed, by kind of unit, way of removal and order."""
    subject, effort = of.subject, of.effort
    unigram = unigram_nats(of, subject)
    kinds = {
        kind: {
            "n_units": len(of.singles(kind, "zero")),
            **{
                ablation: knockout.knockout(
                    subject,
                    kind,
                    of.singles(kind, ablation).sum(1),
                    unigram,
                    effort.fractions,
                    effort.n_masks,
                    of.fills(kind, ablation),
                )
                for ablation in ABLATIONS
            },
        }
        for kind in KINDS
    }
    return {
        "loss": subject.loss,
        "unigram_loss": float(unigram.sum() / subject.n_targets.sum()),
        "skill": mean_per_target(unigram - subject.base, subject.n_targets, "knockout rows"),
        "targets": int(subject.n_targets.sum()),
        "masks": effort.n_masks,
        "fractions": list(effort.fractions),
        "kinds": kinds,
    }


def unigram_nats(of: Measurement, subject: Subject) -> Floats:
    """Nats of each row for who knows how often each token comes in the split, and nothing else."""
    counts = np.zeros(of.trained.tokenizer.vocab_size)
    for batch in of.sweep(of.rows, "counting tokens"):
        counts += np.bincount(batch.targets[batch.targets != IGNORED], minlength=len(counts))
    targets = subject.targets.cpu().numpy()
    with np.errstate(divide="ignore"):
        nats = -np.log(counts / counts.sum())
    return np.where(targets == IGNORED, 0, nats[np.maximum(targets, 0)]).sum(1)


def measure_importance(of: Measurement) -> dict[str, Any]:
    """Importance of single units, backup, and how equal and how spread weights and activity are."""
    n_layer = of.run.model.n_layer
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        subject = of.ranking(kind)
        kinds[kind] = {"loss": subject.loss, "targets": int(subject.n_targets.sum())}
        step = max(1, subject.ids.numel() // of.effort.tokens)
        fewer = subject.every(step)
        for ablation in ABLATIONS:
            singles, fills = of.singles(kind, ablation), of.fills(kind, ablation)
            backup = importance.backup(fewer, kind, singles[:, ::step], of.effort.n_masks, fills)
            kinds[kind][ablation] = {
                **importance.importance(subject, singles, 1 if kind == "dimension" else n_layer),
                "backup": backup,
            }
    return {
        "kinds": kinds,
        "norm_variation": importance.norm_variation(of.model),
        "dimensionality": importance.dimensionality(of.subject),
    }


def measure_mc_dropout(of: Measurement) -> dict[str, Any]:
    if not planned_sites(of.model):
        return {"note": "this model has no dropout to keep on"}
    parts = of.parts(of.effort.tokens)
    return calibration.mc_dropout(of.model, parts, of.run, of.effort.passes, of.watch)


def measure_memorisation(of: Measurement) -> dict[str, Any]:
    if of.split not in ("val", "train", "test"):
        return {"note": "compares the training text with the validation text, not with another"}
    held_out = "val" if of.split == "train" else of.split
    train, val = (of.files().tokens(split) for split in ("train", held_out))
    return memorisation(of.trained, train, val, of.effort.windows, of.watch)


SUITES: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "loss": measure_loss,
    "calibration": measure_calibration,
    "knockout": measure_knockout,
    "importance": measure_importance,
    "memorisation": measure_memorisation,
    "mc-dropout": measure_mc_dropout,
}


def choose_suites(suites: Iterable[str]) -> list[str]:
    """The suites asked for. Raises ConfigError for one that is not there."""
    names = list(suites)
    for name in names:
        if name not in SUITES and name != "all":
            known = ", ".join([*SUITES, "all"])
            hint = did_you_mean(name, SUITES)
            raise ConfigError(f"--suite: no suite {name!r}; there are: {known}{hint}")
    return list(SUITES) if "all" in names else names


def run_suites(
    trained: LanguageModel,
    split: str,
    suites: Iterable[str],
    files: Callable[[], TokenFiles],
    *,
    effort: Effort = FULL,
    dropout_active: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Results by suite; `split` is val, train or a source, `files` opens what has it."""
    names = choose_suites(suites)
    if dropout_active and names != ["loss"]:
        raise ConfigError("--dropout-active: only the suite loss can be measured with dropout on")
    of = Measurement(
        trained, split, files, effort=effort, dropout_active=dropout_active, world=world
    )
    with add_step_to_errors(trained.step):
        return {name: to_json(SUITES[name](of)) for name in names}


def to_json(value: Any) -> Any:
    """As JSON has it: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: to_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def label(split: str) -> str:
    """A split in the name of a file: a source's own name is cut, and its path told by a digest."""
    if split in ("val", "train", "test"):
        return split
    path = split if "://" in split else os.path.realpath(os.path.expanduser(split))
    digest = hashlib.sha256(path.encode(errors="surrogatepass")).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", Path(split).name)[:MOST_NAME]
    return f"{name}-{digest}"


def save_results(
    run_dir: Path, split: str, step: int, results: dict[str, Any], active: bool
) -> list[Path]:
    """Writes eval/SUITE-SPLIT-step-N.json in the run directory; returns where."""
    storage.make_folders(run_dir / "eval")
    written = []
    for name, result in results.items():
        stem = f"{name}-{label(split)}-step-{step:08d}" + "-dropout-active" * active
        about = {"run": str(run_dir), "step": step, "split": split}
        written.append(run_dir / "eval" / f"{stem}.json")
        storage.write_json(written[-1], {**about, **result})
    return written

"""Measuring a model on text: loss, perplexity, bits per byte, accuracy. It changes nothing.

Losses are sums of nats over targets divided by the targets, never means of means, so they do not
depend on the batch size or on padding.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlite.config.run import RunConfig
from gptlite.core.device import GIB, memory_bytes
from gptlite.core.dropout import evaluating
from gptlite.core.loss import nats_of
from gptlite.core.masks import sample_keys
from gptlite.core.model import to_device
from gptlite.core.precision import precision
from gptlite.core.world import ALONE, World
from gptlite.data import tokenizers
from gptlite.data.batches import IGNORED, Batch
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import DataError, DivergedError
from gptlite.keys import key

LOGIT_BYTES = 1 << 25
"""Largest block of logits that an evaluation makes on a CPU, whose caches hold it."""
GPU_BLOCK_BYTES = 1 << 30
"""Largest tensor that an evaluation makes on a GPU, which is idle with less."""
GPU_BLOCK_SHARE = 1 / 32
"""The most that such a tensor may take of the memory. Six of them are there at a time at most (the
logits twice, in float32, their softmax): a fifth of what there is, where training takes half."""
TRAIN_SUBSET_ROWS = 256
"""Rows of training text on which the loss without dropout is measured, always the same."""


@dataclass(frozen=True)
class Measured:
    """Sums over the targets of a split."""

    nats: float
    nats_variance: float
    """Of `nats`, from how rows differ; NaN of a single row."""
    targets: int
    correct: int
    text_nats: float
    """Nats of the targets that stand for bytes: all but end-of-text."""
    text_bytes: int
    loss_by_position: list[float | None]
    """Mean nats of the targets at each place of the context."""
    by_row: Tensor = field(compare=False)
    """Nats and targets of each row, (2, rows) in float64."""

    @property
    def loss(self) -> float:
        """Mean nats per target."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    def report(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "loss_standard_error": math.sqrt(self.nats_variance) / self.targets,
            "perplexity": math.exp(min(self.loss, 700)),
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.correct / self.targets,
            "targets": self.targets,
            "bytes": self.text_bytes,
            "loss_by_position": self.loss_by_position,
        }


def eval_rows(run: RunConfig, vocab_size: int, world: World = ALONE) -> int:
    """Rows per forward pass: as many as the device does well at a time. Losses do not depend on it.

    All ranks take the number that suits the smallest GPU: batches are dealt to them by number.
    """
    model, device = run.model, torch.device(run.device)
    if device.type == "cpu":
        return max(1, min(64, LOGIT_BYTES // (4 * vocab_size * model.context_length)))
    widest = max(vocab_size, model.mlp_width)
    if run.attention == "math":
        widest = max(widest, model.n_head * model.context_length)
    own = run.train.memory_gib
    memory = memory_bytes(device) if own == "auto" else own * GIB
    block = min(GPU_BLOCK_BYTES, memory * GPU_BLOCK_SHARE)
    rows = int(block / (4 * widest * model.context_length))
    return -world.largest(-max(1, min(512, rows)))


def byte_lengths(text: Tokenizer, counts: Mapping[str, int] | None = None) -> Tensor:
    """UTF-8 bytes of the text that every id stands for; 0 for end-of-text.

    `counts` are those of a split, whose text may have characters that the tokenizer does not know.
    One id stands for them, with their mean length; or, where they are skipped, all others do.
    """
    lengths = torch.tensor(tokenizers.token_lengths(text), dtype=torch.float64)
    lost = counts.get("unknown_bytes", 0) if counts else 0
    if not counts or not lost:
        return lengths
    replacement = getattr(text, "replacement", None)
    if replacement is None:
        return lengths * (counts["bytes"] / max(1, counts["bytes"] - lost))
    lengths[replacement] = lost / counts["unknown"]
    return lengths


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    run: RunConfig,
    lengths: Tensor,
    *,
    dropout_active: bool = False,
    world: World = ALONE,
) -> Measured:
    """Loss and accuracy over all targets of the batches, dropout off.

    Of several ranks each measures some batches. What is added up afterwards is one number per row,
    in the order of the rows, so that the sum does not depend on who measured which.
    Raises DataError if there is no target, DivergedError if the loss is not finite, AssertionError
    if two passes over the first batch differ: something random would be live.
    """
    parts: dict[str, list[Tensor]] = {"nats": [], "text_nats": [], "targets": []}
    place_nats, place_targets = torch.zeros(2, run.model.context_length, dtype=torch.float64)
    correct, text_bytes = torch.zeros((), dtype=torch.int64), 0.0
    with evaluating(model, dropout_active=dropout_active), precision(run):
        passes = deal_batches(model, batches, run, world, dropout_active)
        for batch, logits in passes:
            target = torch.from_numpy(batch.targets)
            scored, n_bytes = target != IGNORED, lengths[target.clamp(min=0)]
            nats = torch.zeros(target.shape, dtype=torch.float64)
            if logits is not None:
                to = target.to(logits.device)
                nats = nats_of(logits, to, "none").view_as(to).cpu().double()
                correct += ((logits.argmax(-1) == to).cpu() & scored).sum()
            text = scored & (n_bytes > 0)
            parts["nats"].append(nats.sum(1))
            parts["text_nats"].append((nats * text).sum(1))
            parts["targets"].append(scored.sum(1))
            place_nats[: nats.shape[1]] += nats.sum(0)
            place_targets[: nats.shape[1]] += scored.sum(0)
            text_bytes += float((n_bytes * scored).sum())
    if not parts["nats"] or not int(sum(t.sum() for t in parts["targets"])):
        raise DataError("nothing to evaluate: the text has no target")
    counts = torch.cat(parts["targets"])
    sums, text_nats = (world.sum(torch.cat(parts[name])) for name in ("nats", "text_nats"))
    total, n = float(sums.sum()), int(counts.sum())
    if not math.isfinite(total):
        raise DivergedError(f"evaluation loss {total / n}")
    variance = variance_of_sum(sums, counts)
    by_place = (world.sum(place_nats) / place_targets).tolist()
    places = [None if math.isnan(loss) else loss for loss in by_place]
    right, in_text = int(world.sum(correct)), float(text_nats.sum())
    by_row = torch.stack([sums, counts.double()])
    return Measured(total, variance, n, right, in_text, round(text_bytes), places, by_row)


def variance_of_sum(sums: Tensor, counts: Tensor) -> float:
    """Of a sum over rows, from how far they are from the mean per target; NaN of a single row."""
    rows = int((counts > 0).sum())
    squares = float((sums - sums.sum() / counts.sum() * counts).square().sum())
    return squares * rows / (rows - 1) if rows > 1 else math.nan


def deal_batches(
    model: nn.Module, batches: Iterable[Batch], run: RunConfig, world: World, dropout_active: bool
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Every batch, with its logits where this rank computed them.

    All ranks make as many passes; at the end some compute what another one counts.
    """
    device, n_rows = next(model.parameters()).device, 0
    source = iter(batches)
    groups = iter(lambda: list(islice(source, world.size)), [])
    for number, group in enumerate(groups):
        own = min(world.rank, len(group) - 1)
        for place, batch in enumerate(group):
            rows = np.arange(n_rows, n_rows := n_rows + len(batch.inputs))
            if place != own:
                yield batch, None
                continue
            inputs, _, real = to_device(batch, device)
            if dropout_active:  # native masks: those of this batch, at each call and in any rank
                torch.manual_seed(key(run.seed, "evaluation", number * world.size + place) >> 1)
            samples = sample_keys(run.seed, 0, rows).to(device) if dropout_active else None
            logits = model(inputs, real, samples=samples)
            if number == 0 and not dropout_active:
                again = model(inputs, real)  # what is not finite differs from itself
                same = torch.equal(logits, again) or not logits.isfinite().all()
                assert same, "evaluation is not repeatable"
            yield batch, logits if own == world.rank else None

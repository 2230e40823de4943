"""Measuring a model on text: loss, perplexity, bits per byte, accuracy. It changes nothing.

Losses are sums of nats over targets divided by the targets, never means of means, so they do not
depend on the batch size or on padding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlite import readers, sources, tokenizer
from gptlite.auto import precision
from gptlite.config import RunConfig
from gptlite.data import IGNORED, Batch, Documents, Layout, Stream
from gptlite.dropout import evaluating
from gptlite.errors import ConfigError, DataError
from gptlite.keys import key
from gptlite.loss import nats_of
from gptlite.masks import sample_keys
from gptlite.model import GPT
from gptlite.tokenizer import Tokenizer
from gptlite.trained import Trained

LOGIT_BYTES = 1 << 28
"""Largest block of logits that an evaluation makes."""
TRAIN_SUBSET_ROWS = 256
"""Rows of training text on which the loss without dropout is measured, always the same."""


@dataclass(frozen=True)
class Measured:
    """Sums over the targets of a split."""

    nats: float
    nats_variance: float
    """Sum over rows of (nats - loss * targets) squared."""
    targets: int
    correct: int
    text_nats: float
    """Nats of the targets that stand for bytes: all but end-of-text."""
    text_bytes: int
    loss_by_position: list[float | None]
    """Mean nats of the targets at each place of the context."""

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


def eval_rows(run: RunConfig, vocab_size: int) -> int:
    """Rows per forward pass: many, as long as the logits stay small."""
    return max(1, min(64, LOGIT_BYTES // (4 * vocab_size * run.model.context_length)))


def byte_lengths(text: Tokenizer) -> Tensor:
    """UTF-8 bytes of every id; 0 for end-of-text."""
    return torch.tensor(tokenizer.token_lengths(text))


def tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    real = None if batch.real is None or batch.real.all() else torch.from_numpy(batch.real)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    return inputs.to(device), targets.to(device), None if real is None else real.to(device)


@torch.no_grad()
def measure(
    model: GPT,
    batches: Iterable[Batch],
    run: RunConfig,
    lengths: Tensor,
    *,
    dropout_active: bool = False,
) -> Measured:
    """Loss and accuracy over all targets of the batches, dropout off.

    Raises DataError if there is no target, AssertionError if two passes over the first batch
    differ: something random would be live.
    """
    device = next(model.parameters()).device
    row_nats, row_targets = [], []
    place_nats, place_targets = torch.zeros(2, run.model.context_length, dtype=torch.float64)
    correct, text_nats, text_bytes = 0, 0.0, 0
    n_rows = 0
    if dropout_active:  # native masks: one number, not another at each call
        torch.manual_seed(key(run.seed, "evaluation") >> 1)
    with evaluating(model, dropout_active=dropout_active), precision(run):
        for number, batch in enumerate(batches):
            inputs, targets, real = tensors(batch, device)
            rows = np.arange(n_rows, n_rows := n_rows + len(inputs))
            samples = sample_keys(run.seed, 0, rows).to(device) if dropout_active else None
            logits = model(inputs, real, samples=samples)
            if number == 0 and not dropout_active:
                assert torch.equal(logits, model(inputs, real)), "evaluation is not repeatable"
            nats = nats_of(logits, targets, "none").view_as(targets).double().cpu()
            scored, target = targets.cpu() != IGNORED, targets.cpu().clamp(min=0)
            n_bytes = lengths[target] * scored
            row_nats.append(nats.sum(1))
            row_targets.append(scored.sum(1))
            place_nats[: nats.shape[1]] += nats.sum(0)
            place_targets[: nats.shape[1]] += scored.sum(0)
            correct += int(((logits.argmax(-1) == targets).cpu() & scored).sum())
            text_nats += float(nats[n_bytes > 0].sum())
            text_bytes += int(n_bytes.sum())
    if not row_nats or not int(sum(t.sum() for t in row_targets)):
        raise DataError("nothing to evaluate: the text has no target")
    sums, counts = torch.cat(row_nats), torch.cat(row_targets)
    total, n = float(sums.sum()), int(counts.sum())
    variance = float((sums - total / n * counts).square().sum())
    by_place = (place_nats / place_targets).tolist()
    places = [None if math.isnan(loss) else loss for loss in by_place]
    return Measured(total, variance, n, correct, text_nats, text_bytes, places)


def rows_of_file(trained: Trained, file: str) -> Layout:
    """The rows of a text file that was not part of the training data."""
    path, text, run = Path(file), trained.tokenizer, trained.run
    eot = text.eot if run.data.layout == "documents" else None
    ids: list[int] = [] if eot is None else [eot]
    held = ""
    try:
        sources.check_regular(path)
        for chunk, ends in readers.read_file(path, run.data):
            pieces, held = tokenizer.cut(held + chunk, final=ends)
            for piece in pieces:
                ids += text.encode(piece)
            if ends and eot is not None:
                ids.append(eot)
    except (DataError, ConfigError) as error:
        why = str(error).removeprefix(f"data.source: {path}: ")
        raise DataError(f"--split {file}: {why}") from None
    if len(ids) < 2:
        raise DataError(f"--split {file}: has {len(ids)} tokens, needs >= 2")
    tokens, context_length = np.array(ids), run.model.context_length
    return Stream(tokens, context_length) if eot is None else Documents(tokens, context_length, eot)

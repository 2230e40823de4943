"""What several models are worth as one, and how much of that dropout alone gives.

Averaging the passes of one network with dropout on is said to average many networks (Srivastava et
al. 2014; Gal and Ghahramani 2016). Here both are measured on the same rows at the same cost: of one
model as many passes with dropout on as there are models.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlite.core.dropout import evaluating, planned_sites
from gptlite.core.ensemble import MEANS, combine
from gptlite.core.evaluate import byte_lengths
from gptlite.core.language_model import LanguageModel
from gptlite.core.loss import nats_of
from gptlite.core.model import to_device
from gptlite.core.precision import precision
from gptlite.data.batches import IGNORED, Batch
from gptlite.data.token_files import TokenFiles
from gptlite.data.tokenizers import digest
from gptlite.errors import ConfigError, DivergedError, add_step_to_errors
from gptlite.measure.calibration import sum_passes
from gptlite.measure.intervals import Floats, mean_per_target, ratio
from gptlite.measure.suites import Effort, Measurement, to_json

NAME = "ensemble rows"
"""Of the resamples of rows."""


def run_ensemble(
    members: Sequence[LanguageModel], split: str, files: Callable[[], TokenFiles], effort: Effort
) -> dict[str, Any]:
    """What several models are worth as one on a split that `files` opens, as JSON has it."""
    check_members(members)
    shortest = min(members, key=lambda member: member.context_length)
    of = Measurement(shortest, split, files, effort=effort)
    lengths = byte_lengths(shortest.tokenizer, of.files().counts(of.part))
    rows = of.sweep(of.rows, "ensemble", effort.loss_rows)
    some = of.parts(effort.tokens)
    with add_step_to_errors(shortest.step):
        found: dict[str, Any] = to_json(measure_ensemble(members, rows, some, lengths, of.watch))
    return found


def check_members(members: Sequence[LanguageModel]) -> None:
    """Raises ConfigError unless all read text alike."""
    first = members[0]
    for number, other in enumerate(members[1:], 2):
        if digest(other.tokenizer) != digest(first.tokenizer):
            raise ConfigError(
                f"--ensemble: model {number} has another tokenizer ({other.tokenizer.kind} of "
                f"{other.tokenizer.vocab_size}) than the first ({first.tokenizer.kind} of "
                f"{first.tokenizer.vocab_size}); only models that share one can be averaged"
            )
        layouts = {each.run.data.layout for each in (first, other)}
        if len(layouts) > 1:
            raise ConfigError(
                f"--ensemble: model {number} was trained on data.layout {other.run.data.layout}, "
                f"the first on {first.run.data.layout}; they begin texts differently"
            )


@torch.no_grad()
def sum_nats(
    members: Sequence[LanguageModel], batches: Iterable[Batch], lengths: Tensor
) -> dict[str, Floats]:
    """Sums per row: nats of each member (`member 1` ...) and of both means, targets and bytes."""
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        targets = torch.from_numpy(batch.targets)
        scored, n_bytes = targets != IGNORED, lengths[targets.clamp(min=0)]
        logits = [read_batch(member, batch) for member in members]
        named = {f"member {number}": each for number, each in enumerate(logits, 1)}
        named |= {mean: combine(logits, mean) for mean in MEANS}
        row = {"targets": scored.sum(1), "bytes": (n_bytes * scored).sum(1)}
        for name, each in named.items():
            nats = nats_of(each, targets.to(each.device), "none").view_as(targets).cpu().double()
            row[name] = nats.sum(1)
            row[f"{name}, text"] = (nats * (n_bytes > 0)).sum(1)
        for name, values in row.items():
            sums.setdefault(name, []).append(values.double())
    found = {name: torch.cat(parts).numpy() for name, parts in sums.items()}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise DivergedError("the loss of a member is not finite")
    return found


def read_batch(member: LanguageModel, batch: Batch) -> Tensor:
    """Logits (B, T, V) of one member, with dropout off."""
    inputs, _, real = to_device(batch, next(member.model.parameters()).device)
    with evaluating(member.model), precision(member.run):
        return member.model(inputs, real).float()


def measure_ensemble(
    members: Sequence[LanguageModel],
    batches: Iterable[Batch],
    some: Sequence[Batch],
    lengths: Tensor,
    watch: Callable[[Iterable[int], str], Iterable[int]],
) -> dict[str, Any]:
    """The loss of each member, of their means, and of averaged passes with dropout on over `some`
    rows. Differences are taken in pairs, below 0 where averaging helps."""
    sums = sum_nats(members, batches, lengths)
    targets = sums["targets"]
    names = [f"member {number}" for number in range(1, len(members) + 1)]
    mean_member = np.mean([sums[name] for name in names], axis=0)
    found: dict[str, Any] = {
        "models": len(members),
        "member_loss": [mean_per_target(sums[name], targets, NAME)["value"] for name in names],
        "mean_member_loss": mean_per_target(mean_member, targets, NAME),
    }
    for mean in MEANS:
        found[f"mean_of_{mean}"] = {
            "loss": mean_per_target(sums[mean], targets, NAME),
            "bits_per_byte": bits_per_byte(sums[f"{mean}, text"], sums["bytes"]),
            "minus_mean_member": mean_per_target(sums[mean] - mean_member, targets, NAME),
        }
    found["targets"] = int(targets.sum())
    found["mc_dropout"] = compare_with_passes(members, some, lengths, watch)
    return found


def bits_per_byte(nats: Floats, n_bytes: Floats) -> float | None:
    return float(nats.sum() / n_bytes.sum() / np.log(2)) if n_bytes.sum() else None


def compare_with_passes(
    members: Sequence[LanguageModel],
    some: Sequence[Batch],
    lengths: Tensor,
    watch: Callable[[Iterable[int], str], Iterable[int]],
) -> dict[str, Any]:
    """As many passes of one model with dropout on as there are models, beside their ensemble; the
    mean over the members that drop."""
    dropping = [member for member in members if planned_sites(member.model)]
    n = len(members)
    if n == 1 or not dropping:
        return {"note": "one model" if n == 1 else "these models have no dropout to keep on"}
    sums = sum_nats(members, some, lengths)
    targets = sums["targets"]
    alone = np.mean([sums[f"member {number}"] for number in range(1, n + 1)], axis=0)
    passes = [sum_passes(each.model, some, each.run, (n,), watch) for each in dropping]
    gained = np.mean([found["deterministic"] - found[str(n)] for found in passes], axis=0)
    together = alone - sums["probabilities"]  # passes, too, are averaged as probabilities
    return {
        "passes": n,
        "targets": int(targets.sum()),
        "averaged_minus_deterministic": mean_per_target(-gained, targets, NAME),
        "ensemble_minus_mean_member": mean_per_target(-together, targets, NAME),
        "share_of_ensemble": ratio(
            gained, together, NAME, "the ensemble gains nothing that is certain"
        ),
    }

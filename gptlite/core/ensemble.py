"""Several models that answer as one: the mean of their logits, or of their probabilities.

A network trained with dropout is said to be such a mean of many (Srivastava et al. 2014); this is
the explicit one, of models that were trained apart.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptlite.core.model import GPT

Mean = Literal["logits", "probabilities"]
MEANS: tuple[Mean, ...] = ("logits", "probabilities")


def members_of(model: "GPT | Ensemble") -> list[GPT]:
    """The models that read: those of an ensemble, or the one."""
    return model.members if isinstance(model, Ensemble) else [model]


def combine(logits: Sequence[Tensor], mean: Mean) -> Tensor:
    """(B, T, V) of each model → logits of their mean; those of one model stay as they are.

    The mean of logits is, after the softmax, the geometric mean of the probabilities.
    """
    if len(logits) == 1:
        return logits[0]
    if mean == "logits":
        return torch.stack([each.float() for each in logits]).mean(0)
    spread = torch.stack([each.float().log_softmax(-1) for each in logits])
    return spread.logsumexp(0) - math.log(len(logits))


class Ensemble(nn.Module):
    """Reads as each of its models does, and gives the logits of their mean."""

    def __init__(self, models: Sequence[GPT], mean: Mean = "logits") -> None:
        super().__init__()
        self.members, self.mean = list(models), mean
        self.models = nn.ModuleList(models)
        self.vocab_size = models[0].vocab_size
        shortest = min(model.config.context_length for model in models)
        self.config = models[0].config.model_copy(update={"context_length": shortest})

    def forward(self, ids: Tensor, real: Tensor | None = None, **named: Any) -> Tensor:
        """(B, T) ids → (B, T, V) logits."""
        return combine([model(ids, real, **named) for model in self.members], self.mean)

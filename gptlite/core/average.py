"""The average of the weights of all updates, the later ones counting more.

Late in a run weights move to and fro around a better place; their average lies nearer to it (Polyak
and Juditsky 1992; Izmailov et al., arXiv:1803.05407). Training never sees it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptlite.core.model import GPT


class Average:
    """Of the weights after updates 1 to n, with shares that halve every `half_life` updates.

    The shares sum to one from the first update on, so nothing of the untrained weights is in it.
    """

    def __init__(self, model: GPT, half_life: float) -> None:
        self.keep = 0.5 ** (1 / half_life)
        named = dict(model.named_parameters())
        self.parameters = list(named.values())
        self.tensors = {name: p.detach().clone() for name, p in named.items()}
        """By the name of the parameter."""

    @torch.no_grad()
    def begin(self) -> None:
        """Let the average be what the model has now."""
        for mean, parameter in zip(self.tensors.values(), self.parameters, strict=True):
            mean.copy_(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 1."""
        share = (1 - self.keep) / (1 - self.keep**step)
        for mean, parameter in zip(self.tensors.values(), self.parameters, strict=True):
            mean.lerp_(parameter, share)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the averaged weights inside, and afterwards its own, bit for bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for mean, parameter in zip(self.tensors.values(), self.parameters, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(own)

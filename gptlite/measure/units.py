"""A model without some of its units: heads, neurons, layers or dimensions of its residual stream.

A removed unit hands on its mean over other text, or zero. Zero is what dropout trains for, so it
favours models trained with it; the mean does not, and both are always reported. Which units go in
which mask depends on names alone: two models of one shape lose the same ones.

Shapes: K masks, N units of a kind, R rows of text, T tokens, C features.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptlite.config.run import RunConfig
from gptlite.core.dropout import evaluating
from gptlite.core.evaluate import eval_rows
from gptlite.core.loss import nats_of
from gptlite.core.model import GPT, Block, Scene, to_device
from gptlite.core.precision import precision
from gptlite.data.batches import IGNORED, Batch
from gptlite.errors import DivergedError
from gptlite.keys import key, uniform
from gptlite.measure.intervals import Floats

ABLATIONS = ("mean", "zero")
"""The mean first: zero is what dropout trains for, and favours it."""
TOKENS_AT_ONCE = 4096
"""Tokens of a forward pass, over several masks if the text is short: what a CPU is fastest at."""


class UnitOutput(NamedTuple):
    """A module of whose output the units are parts."""

    module: nn.Module
    units: slice
    """Which of all units of the kind stand here."""
    axis: int
    """Along which dimension of the output; a whole output is one unit."""


def blocks(model: GPT) -> list[Block]:
    return cast(list[Block], list(model.blocks))


def heads(model: GPT) -> Iterator[UnitOutput]:
    """What each head reads, before the output matrix: (B, H, T, D)."""
    n = model.config.n_head
    for layer, block in enumerate(blocks(model)):
        yield UnitOutput(block.attention.drop_head, slice(layer * n, layer * n + n), 1)


def neurons(model: GPT) -> Iterator[UnitOutput]:
    """Activations of the MLP: (B, T, 4C)."""
    n = model.config.mlp_width
    for layer, block in enumerate(blocks(model)):
        yield UnitOutput(block.mlp.drop_activation, slice(layer * n, layer * n + n), 2)


def layers(model: GPT) -> Iterator[UnitOutput]:
    """All that a block adds: attention and MLP."""
    for layer, block in enumerate(blocks(model)):
        yield from (
            UnitOutput(part, slice(layer, layer + 1), 0) for part in (block.attention, block.mlp)
        )


def dimensions(model: GPT) -> Iterator[UnitOutput]:
    """One feature of the residual stream, wherever something is written to it."""
    every = slice(0, model.config.n_embd)
    yield UnitOutput(model.drop_embedding, every, 2)
    for block in blocks(model):
        yield from (UnitOutput(part, every, 2) for part in (block.attention, block.mlp))


KINDS: dict[str, Callable[[GPT], Iterator[UnitOutput]]] = {
    "head": heads,
    "neuron": neurons,
    "layer": layers,
    "dimension": dimensions,
}


def n_units(model: GPT, kind: str) -> int:
    return max(place.units.stop for place in KINDS[kind](model))


def replace_units(
    place: UnitOutput, gone: Tensor, fill: Tensor, _: Any, __: Any, output: Tensor
) -> Tensor:
    """A forward hook: the output without the units that are gone, (B, units) at this place."""
    shape = [len(gone)] + [1] * (output.ndim - 1)
    shape[place.axis or 1] = gone.shape[1]
    return torch.where(gone.view(shape), fill.to(output.dtype), output)


@contextmanager
def remove_units(
    places: Sequence[UnitOutput], removed: Tensor, fills: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, row b of a batch does without the units where `removed` (B, N) is True."""
    with ExitStack() as stack:
        for place, fill in zip(places, fills, strict=True):
            gone = removed[:, place.units]
            if gone.any():
                hook = partial(replace_units, place, gone, fill)
                stack.callback(place.module.register_forward_hook(hook).remove)
        yield


class Subject:
    """A trained model, and the rows of text on which it is measured, dropout off."""

    def __init__(
        self, model: GPT, run: RunConfig, batch: Batch, watch: Any = lambda work, _: work
    ) -> None:
        self.model = model
        self.run = run
        self.watch = watch
        device = model.token_embedding.weight.device
        self.ids, self.targets, self.real = to_device(batch, device)
        self.n_targets: Floats = (batch.targets != IGNORED).sum(1).astype(np.float64)
        self.at_once = max(1, TOKENS_AT_ONCE // self.ids.numel())
        self.rows_at_once = eval_rows(run, model.vocab_size)
        nothing = torch.zeros(1, n_units(model, "head"), dtype=torch.bool)
        self.base = self.row_nats("head", nothing)[0]
        if not np.isfinite(self.base).all():
            raise DivergedError(f"evaluation loss {self.loss}")

    def every(self, step: int) -> "Subject":
        """The same model on row 0 and every `step` rows from there."""
        part = copy.copy(self)
        part.ids, part.targets = self.ids[::step], self.targets[::step]
        part.real = None if self.real is None else self.real[::step]
        part.n_targets, part.base = self.n_targets[::step], self.base[::step]
        part.at_once = max(1, TOKENS_AT_ONCE // part.ids.numel())
        return part

    @property
    def loss(self) -> float:
        """Nats per target with nothing removed."""
        return float(self.base.sum() / self.n_targets.sum())

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, the model runs as it is evaluated: no gradients, dropout off."""
        with torch.no_grad(), evaluating(self.model), precision(self.run):
            yield

    def row_nats(
        self,
        kind: str,
        removed: Tensor,
        fills: Sequence[Tensor] | None = None,
        first: int = 0,
        inputs: Tensor | None = None,
    ) -> Floats:
        """Nats of each row without the units of each mask: removed (K, N) → (K, R).

        `inputs` (R, T, C) is what block `first` reads, where nothing before it is removed.
        """
        places = list(KINDS[kind](self.model))
        fills = fills or [torch.zeros(())] * len(places)
        rows, out = len(self.ids), []
        for part in self.split_masks(kind, fills, removed.to(self.ids.device)):
            n = len(part)
            gone = part.repeat_interleave(rows, 0)
            with self.inference(), remove_units(places, gone, fills):
                x, scene = self.begin(n)
                x = x if inputs is None else inputs.repeat(n, 1, 1)
                out.append(self.nats_from(x, scene, first, n))
        return torch.cat(out).numpy()

    def split_masks(self, kind: str, fills: Sequence[Tensor], masks: Tensor) -> Iterable[Tensor]:
        """As many masks as are best done at once, with a progress bar."""
        name = f"{kind}s to {'mean' if fills[0].ndim else 'zero'}"
        return self.watch(masks.split(self.at_once), name)

    def begin(self, n: int) -> tuple[Tensor, Scene]:
        """What the first block reads, n times over."""
        real = None if self.real is None else self.real.repeat(n, 1)
        return self.model.embed(self.ids.repeat(n, 1), real)

    def nats_from(self, x: Tensor, scene: Scene, first: int, n: int) -> Tensor:
        """From what block `first` reads, (n R, T, C), to the nats of each row, (n, R)."""
        x = self.model.run_blocks(x, scene, first)
        parts = x.split(self.rows_at_once)
        targets = self.targets.repeat(n, 1).split(self.rows_at_once)
        nats = [
            nats_of(self.model.head(part), wanted, "none")
            for part, wanted in zip(parts, targets, strict=True)
        ]
        return torch.cat(nats).view(n, len(self.ids), -1).cpu().double().sum(2)

    def outputs(self, modules: Iterable[nn.Module]) -> list[Tensor]:
        """What these modules put out with nothing removed."""
        found: list[Tensor] = []

        def keep(_: Any, __: Any, output: Tensor) -> None:
            found.append(output)

        with self.inference(), ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(keep).remove)
            self.model.features(self.ids, self.real)
        return found

    def means(self, kind: str) -> list[Tensor]:
        """Mean output of each place of a kind over all real tokens, to be put in place of units."""
        places = list(KINDS[kind](self.model))
        outputs = self.outputs(place.module for place in places)
        found = []
        for place, output in zip(places, outputs, strict=True):
            by_token = output.transpose(1, 2) if place.axis == 1 else output  # (B, T, ...)
            seen = by_token.flatten(0, 1) if self.real is None else by_token[self.real]
            mean = seen.float().mean(0)
            found.append(mean[:, None] if place.axis == 1 else mean)  # heads: (H, 1, D)
        return found

    def singles(self, kind: str, fills: Sequence[Tensor] | None = None) -> Floats:
        """Nats of each row without each unit alone, (N, R)."""
        if kind == "neuron":
            return self.single_neurons(fills)
        alone = torch.eye(n_units(self.model, kind), dtype=torch.bool)
        if kind == "dimension":
            return self.row_nats(kind, alone, fills)
        # What is before the block of a unit does not change.
        by_layer = alone.split(len(alone) // self.model.config.n_layer)
        with self.inference():
            embedded, _ = self.begin(1)
        inputs = [embedded, *self.outputs(self.model.blocks)]
        return np.concatenate(
            [self.row_nats(kind, units, fills, i, inputs[i]) for i, units in enumerate(by_layer)]
        )

    def single_neurons(self, fills: Sequence[Tensor] | None = None) -> Floats:
        """The same for neurons, of which there are many: one writes its activation times its
        column of the output matrix, so without it a block hands on that much less."""
        found, model = [], self.model
        states = self.outputs(model.blocks)
        activations = self.outputs(block.mlp.drop_activation for block in blocks(model))
        fills = fills or [torch.zeros(())] * len(states)
        for layer, block in enumerate(blocks(model)):
            change = (fills[layer] - activations[layer].float()).permute(2, 0, 1)  # (M, R, T)
            columns = block.mlp.down.weight.float().T  # (M, C)
            for units in self.split_masks("neuron", fills, torch.arange(len(columns))):
                written = change[units, ..., None] * columns[units, None, None]  # (n, R, T, C)
                with self.inference():
                    _, scene = self.begin(len(units))
                    x = (states[layer] + written).flatten(0, 1)
                    found.append(self.nats_from(x, scene, layer + 1, len(units)))
        return torch.cat(found).numpy()


def random_orders(kind: str, n: int, n_masks: int) -> NDArray[np.int64]:
    """Orders in which units go, (n_masks, n): the same for every model with n units."""
    numbers = np.arange(n_masks * n, dtype=np.int64)
    return uniform(key("knockout", kind, n), numbers).reshape(n_masks, n).argsort(1)

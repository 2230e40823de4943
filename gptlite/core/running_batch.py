"""Texts that grow together, a token of each at a time; any may join and leave in between.

What a row becomes depends on its prompt, its options and the key of its draws, not on its company:
prompts are read one by one, in chunks that begin where the text begins, and rows are decoded by
loops that keep them apart. (Without those loops, on a GPU or where no C compiler is, sums may be
made in another order in another company, and differ in the last digit.)
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gptlite.config.run import SampleConfig
from gptlite.core.decode import DecodingCache
from gptlite.core.dropout import dropouts, evaluating
from gptlite.core.ensemble import Ensemble, combine, members_of
from gptlite.core.kernels import FEW_ROWS
from gptlite.core.model import GPT, KVCache
from gptlite.core.sampling import draw, probabilities
from gptlite.errors import DivergedError
from gptlite.keys import uniform

CHUNK = 256
"""Tokens of a prompt that are read at once, between two tokens of the other rows."""
CHANCES = 256
"""Steps for which the draws of a row are made together."""


@dataclass(eq=False)
class Row:
    """A prompt and what has been written behind it."""

    ids: list[int]
    options: SampleConfig
    name: int
    """Key of its draws."""
    begin: int
    """The first of `ids` that it still reads."""
    seen: Tensor | None
    """(V,) tokens that are in the text, where repeating them has a price."""
    n_new: int = 0
    chances: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class Reading:
    """A prompt that is being read, for rows that all begin with it."""

    ids: list[int]
    """All but the last token, which is decoded as those that follow it are."""
    rows: list[Row]
    caches: list[KVCache] = field(default_factory=list)
    n_read: int = 0


class RunningBatch:
    """At most `most_rows` rows that a model continues.

    When a row's context is full, its last half context is read anew and it goes on. `context` is
    how much of the model's was trained (None: all), `unseen` what is never drawn.
    """

    def __init__(
        self,
        model: GPT | Ensemble,
        most_rows: int,
        context: int | None = None,
        unseen: Sequence[int] = (),
    ) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.context = min(context or model.config.context_length, model.config.context_length)
        self.caches = self.make_caches(most_rows)
        for cache in self.caches:
            cache.lengths = []
        self.sites = dropouts(model)
        self.rows: list[Row] = []
        """Those that have been read, in the order of the caches' rows."""
        self.readings: deque[Reading] = deque()
        self.never: Tensor | None = None
        if unseen:
            self.never = self.no_tokens()
            self.never[list(unseen)] = True

    def make_caches(self, n_rows: int) -> list[KVCache]:
        return [DecodingCache(each, n_rows) for each in members_of(self.model)]

    def no_tokens(self) -> Tensor:
        return torch.zeros(self.model.vocab_size, dtype=torch.bool, device=self.device)

    def join(self, prompt: Sequence[int], names: Sequence[int], options: SampleConfig) -> list[Row]:
        """A row for each of `names` that continues this prompt, which is read once."""
        begin, seen = max(0, len(prompt) - self.context), None
        rows = []
        for name in names:
            if options.repetition_penalty != 1:
                seen = self.no_tokens()
                seen[list(prompt)] = True
            rows.append(Row(list(prompt), options, name, begin, seen))
        self.read_later(rows)
        return rows

    def read_later(self, rows: list[Row]) -> None:
        self.readings.append(Reading(rows[0].ids[rows[0].begin : -1], rows))

    def leave(self, row: Row) -> None:
        """The row ends; the last one takes its place."""
        if row not in self.rows:
            for reading in self.readings:
                reading.rows = [other for other in reading.rows if other is not row]
            self.readings = deque(reading for reading in self.readings if reading.rows)
            return
        at = self.rows.index(row)
        self.rows[at] = self.rows[-1]
        self.rows.pop()
        for cache in self.caches:
            copy_row(cache, len(self.rows), cache, at)
            cache.lengths[at] = cache.lengths[-1]
            cache.lengths.pop()

    @torch.no_grad()
    def step(self, most_chunks: int | None = None) -> tuple[list[Row], Tensor]:
        """One more token of every row that has been read, and the logits (N, V) it is drawn from.

        Reads `most_chunks` chunks of prompts before (None: all of them). Raises DivergedError.
        """
        for row in [row for row in self.rows if len(row.ids) - row.begin > self.context]:
            row.begin = len(row.ids) - max(1, self.context // 2)
            self.leave(row)
            self.read_later([row])
        quiet = not any(site.training for site in self.sites)
        with nullcontext() if quiet else evaluating(self.model):
            self.read(most_chunks)
            if not self.rows:
                return [], torch.empty(0, self.model.vocab_size)
            logits = self.next_logits()
        if not logits.isfinite().all():
            raise DivergedError("the model's logits are not finite")
        rows = list(self.rows)
        for row, token in zip(rows, self.draw_tokens(logits), strict=True):
            row.ids.append(token)
            row.n_new += 1
            if row.seen is not None:
                row.seen[token] = True
        return rows, logits

    def read(self, most_chunks: int | None) -> None:
        """Prompts in their order; the rows of one that has been read to its end come in."""
        n_chunks = 0
        while self.readings:
            reading = self.readings[0]
            reading.caches = reading.caches or self.make_caches(1)
            if reading.n_read < len(reading.ids):
                if n_chunks == most_chunks:
                    return
                chunk = reading.ids[reading.n_read : reading.n_read + CHUNK]
                for member, cache in zip(members_of(self.model), reading.caches, strict=True):
                    member.features(torch.tensor([chunk], device=self.device), cache=cache)
                reading.n_read, n_chunks = reading.n_read + len(chunk), n_chunks + 1
            if reading.n_read == len(reading.ids):
                self.readings.popleft()
                self.take_in(reading)

    def take_in(self, reading: Reading) -> None:
        for row in reading.rows:
            for cache, read in zip(self.caches, reading.caches, strict=True):
                copy_row(read, 0, cache, len(self.rows))
                cache.lengths.append(read.lengths[0])
            self.rows.append(row)

    def next_logits(self) -> Tensor:
        """(N, V) of what follows the last token of each row."""
        ids = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.device)
        each = []
        for member, cache in zip(members_of(self.model), self.caches, strict=True):
            x = member.features(ids, cache=cache)[:, -1]
            # So many rows at a time are multiplied by loops that keep them apart.
            parts = [member.head(part) for part in x.split(FEW_ROWS)]
            each.append(torch.cat(parts).float())
        return combine(each, self.model.mean) if isinstance(self.model, Ensemble) else each[0]

    def draw_tokens(self, logits: Tensor) -> list[int]:
        """A token of each row by its own options; rows of equal options are drawn together."""
        alike: dict[SampleConfig, list[int]] = {}
        for at, row in enumerate(self.rows):
            alike.setdefault(row.options, []).append(at)
        tokens = [0] * len(self.rows)
        for options, places in alike.items():
            rows = [self.rows[at] for at in places]
            marks = [row.seen for row in rows if row.seen is not None]
            seen = torch.stack(marks) if marks else None
            own = logits if len(places) == len(logits) else logits[places]
            drawn = draw(probabilities(own, seen, options, self.never), chances_of(rows))
            for at, token in zip(places, drawn.tolist(), strict=True):
                tokens[at] = token
        return tokens


def copy_row(source: KVCache, at: int, target: KVCache, to: int) -> None:
    """What row `at` of a cache has seen, into row `to` of another."""
    n = source.lengths[at]
    for mine, theirs in zip(target.keys + target.values, source.keys + source.values, strict=True):
        mine[to, :, :n] = theirs[at, :, :n]


def chances_of(rows: Sequence[Row]) -> Tensor:
    """(N,) a number in [0, 1) for the next draw of each row."""
    for row in rows:
        if row.n_new % CHANCES == 0:
            row.chances = uniform(row.name, np.arange(row.n_new, row.n_new + CHANCES))
    return torch.tensor([row.chances[row.n_new % CHANCES] for row in rows], dtype=torch.float64)

"""Continuations of prompts as text: generated in a batch, streamed as soon as they are certain.

A continuation depends on (seed, prompt, number of the sample) alone, not on what else is in the
batch: each draw is one number from a key.
"""

import codecs
import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gptlite.config.run import SampleConfig
from gptlite.core.ensemble import Ensemble
from gptlite.core.model import GPT
from gptlite.core.running_batch import RunningBatch
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError
from gptlite.keys import key


def halve(model: nn.Module) -> None:
    """Matrices in bfloat16, as a run in bfloat16 multiplied by them; the pace is that of memory."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()


def continuations(
    model: GPT | Ensemble,
    prompts: Sequence[Sequence[int]],
    names: Sequence[int],
    options: SampleConfig,
    context: int | None = None,
    unseen: Sequence[int] = (),
) -> Iterator[list[int]]:
    """The next token of every prompt, step by step; `names` keys the draws of each."""
    batch = RunningBatch(model, len(prompts), context, unseen)
    rows = [
        row
        for prompt, name in zip(prompts, names, strict=True)
        for row in batch.join(prompt, [name], options)
    ]
    for _ in range(options.max_new_tokens):
        batch.step()
        yield [row.ids[-1] for row in rows]


class TextStream:
    """Turns the tokens of one continuation into text that can be shown at once.

    Bytes that may be half a character, and text that may be the beginning of a stop string, wait.
    """

    def __init__(self, text: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = text, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.finished = ""
        """Why it ended: `eot`, `stop`, `length`, or nothing yet."""
        self.n_tokens = 0

    def feed(self, token: int) -> str:
        """The text that is certain after one more token."""
        if self.finished:
            return ""
        self.n_tokens += 1
        if token == self.tokenizer.eot or token in self.tokenizer.marks.ends:
            return self.end("eot")
        self.held += self.decoder.decode(self.tokenizer.token_bytes(token))
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finished, out = "stop", self.held[: min(found)]
            return out
        waiting = max((overlap(self.held, stop) for stop in self.stops), default=0)
        out, self.held = (
            self.held[: len(self.held) - waiting],
            self.held[len(self.held) - waiting :],
        )
        return out

    def end(self, why: str) -> str:
        """What was still waiting when generation ended."""
        if self.finished:
            return ""
        self.finished = why
        return self.held + self.decoder.decode(b"", final=True)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Piece:
    """Some text of one continuation."""

    prompt: int
    sample: int
    text: str


class Generation:
    """Continuations of several prompts, `num_samples` of each, streamed together."""

    def __init__(
        self,
        model: GPT | Ensemble,
        text: Tokenizer,
        prompts: Sequence[str],
        options: SampleConfig,
        *,
        seed: int,
        num_samples: int = 1,
        stops: Sequence[str] = (),
        documents: bool = False,
        context: int | None = None,
        unseen: Sequence[int] = (),
    ) -> None:
        self.model, self.options, self.context = model, options, context
        self.prompts, self.unseen, self.seed, self.num_samples = prompts, unseen, seed, num_samples
        self.ids = [encode_prompt(text, prompt, documents, unseen=unseen) for prompt in prompts]
        self.streams = {
            (p, s): TextStream(text, stops) for p in range(len(prompts)) for s in range(num_samples)
        }

    def pieces(self) -> Iterator[Piece]:
        """Text as it becomes certain; ends when every continuation has ended."""
        batch = RunningBatch(self.model, len(self.streams), self.context, self.unseen)
        place = {}
        for p, ids in enumerate(self.ids):
            names = sample_names(self.seed, ids, self.num_samples)
            for s, row in enumerate(batch.join(ids, names, self.options)):
                place[row] = p, s
        while place:
            batch.step()
            for row, (p, s) in list(place.items()):
                stream = self.streams[p, s]
                text = stream.feed(row.ids[-1])
                if stream.n_tokens == self.options.max_new_tokens:
                    text += stream.end("length")
                if text:
                    yield Piece(p, s, text)
                if stream.finished:
                    batch.leave(row)
                    del place[row]

    def results(self) -> list[dict[str, Any]]:
        """Everything at once: prompt, text, tokens and why each ended."""
        texts = dict.fromkeys(self.streams, "")
        for piece in self.pieces():
            texts[piece.prompt, piece.sample] += piece.text
        return [
            {
                "prompt": self.prompts[p],
                "sample": s,
                "text": texts[p, s],
                "tokens": stream.n_tokens,
                "finished": stream.finished,
            }
            for (p, s), stream in self.streams.items()
        ]


def sample_names(seed: int, ids: Sequence[int], n: int) -> list[int]:
    """What keys the draws of n samples that continue the same prompt."""
    digest = hashlib.blake2b(np.array(ids).tobytes()).hexdigest()
    return [key(seed, "sample", digest, sample) for sample in range(n)]


def first_token(text: Tokenizer, documents: bool) -> int | None:
    """Where documents are rows, each begins with the end-of-text token; else as a model came."""
    return text.eot if documents else text.marks.begin


def encode_text(text: Tokenizer, prompt: str, place: str) -> list[int]:
    """Ids of a text by itself. Raises ConfigError naming `place` and what is not known."""
    try:
        prompt.encode()
        return text.encode(prompt)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: not valid UTF-8 at character {error.start + 1}") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def encode_prompt(
    text: Tokenizer,
    prompt: str,
    documents: bool,
    *,
    place: str = "prompt",
    unseen: Collection[int] = (),
) -> list[int]:
    """Ids of a prompt, after the token that every text begins with, if there is one. An empty one
    is the end-of-text token, a new line, or the first token that the training text had.

    Raises ConfigError naming `place` and the character that the tokenizer does not know.
    """
    ids = encode_text(text, prompt, place)
    if (first := first_token(text, documents)) is not None:
        return [first, *ids]
    if ids:
        return ids
    with suppress(ConfigError):
        for begin in ([] if text.eot is None else [text.eot], text.encode("\n")):
            if begin and not set(begin).intersection(unseen):
                return begin
    return [next(i for i in range(text.vocab_size) if i not in unseen)]

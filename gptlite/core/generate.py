"""Sampling: a chain of pure functions from logits to a token, and cached generation in batches.

A continuation depends on (seed, prompt, number of the sample) alone, not on what else is in the
batch: each draw is one number from a key.
"""

import codecs
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlite.config.run import SampleConfig
from gptlite.core.decode import DecodingCache
from gptlite.core.dropout import dropouts, evaluating
from gptlite.core.ensemble import Ensemble, combine, members_of
from gptlite.core.model import GPT, KVCache
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError, DivergedError
from gptlite.keys import key, uniform

CHANCES = 256
"""Steps for which draws are made together."""
LARGEST = 1e30
"""Logits and factors stay below it, so that no option gives infinity less infinity."""
ROUNDING = 1e-6
"""What sums and quotients of probabilities in float32 may miss a bound by, and still reach it."""


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens (CTRL, arXiv:1909.05858)."""
    penalty = min(max(penalty, 1 / LARGEST), LARGEST)
    punished = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, punished.clamp(-LARGEST, LARGEST), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits; the others become -inf. Ties at the edge stay."""
    edge = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < edge, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities sum to p (arXiv:1904.09751)."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    reached = ordered.softmax(-1).cumsum(-1) >= p - ROUNDING
    beyond = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    return logits.masked_fill(beyond.gather(-1, index.argsort(-1)), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
    probability = logits.softmax(-1)
    least = (p - ROUNDING) * probability.amax(-1, keepdim=True)
    return logits.masked_fill(probability < least, -math.inf)


def probabilities(
    logits: Tensor, seen: Tensor, options: SampleConfig, unseen: Tensor | None = None
) -> Tensor:
    """(B, V) logits → (B, V) probabilities; `seen` (B, V) marks tokens already in the text,
    `unseen` (V,) those that the training text never had."""
    if unseen is not None:
        logits = logits.masked_fill(unseen, -math.inf)
    if options.repetition_penalty != 1:
        logits = penalise(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    if options.temperature < 1e-4:  # the likeliest would become infinite
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(options.temperature, 1 / LARGEST)
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits.softmax(-1)


def draw(probability: Tensor, chance: Tensor) -> Tensor:
    """The token where the summed probability passes `chance` in [0, 1); (B, V), (B,) → (B,).

    On the CPU: sums are made in float64, which Apple's GPUs do not have.
    """
    summed = probability.cpu().double().cumsum(-1)
    token = (summed <= (chance * summed[:, -1])[:, None]).sum(-1)
    return token.clamp(max=probability.shape[-1] - 1)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows filled up on the left, and which tokens are real (None: all)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    real = torch.tensor([[i >= width - len(row) for i in range(width)] for row in rows])
    return ids, real.to(device)


def halve(model: nn.Module) -> None:
    """Matrices in bfloat16, as a run in bfloat16 multiplied by them; the pace is that of memory."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()


def next_logits(
    model: GPT | Ensemble, ids: Tensor, real: Tensor | None, caches: Sequence[KVCache]
) -> Tensor:
    """(B, T) new tokens → (B, V) logits of what follows the last of them."""
    each = [
        reader.head(reader.features(ids, real, cache)[:, -1]).float()
        for reader, cache in zip(members_of(model), caches, strict=True)
    ]
    return combine(each, model.mean) if isinstance(model, Ensemble) else each[0]


@torch.no_grad()
def continuations(
    model: GPT | Ensemble,
    prompts: Sequence[Sequence[int]],
    names: Sequence[int],
    options: SampleConfig,
    context: int | None = None,
    unseen: Sequence[int] = (),
) -> Iterator[list[int]]:
    """The next token of every row, step by step; `names` keys the draws of each row.

    When a row's context is full, its last half context is read anew and generation goes on; the
    other rows keep what they have seen, so a row does not depend on its company. `context` is how
    much of the model's was trained (None: all), `unseen` what is never drawn.
    """
    device, length = next(model.parameters()).device, model.config.context_length
    context = min(context or length, length)
    rows = [list(prompt) for prompt in prompts]
    seen = torch.zeros(len(rows), model.vocab_size, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        seen[i, row] = True
    never = None
    if unseen:
        never = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
        never[list(unseen)] = True
    begins = [max(0, len(row) - context) for row in rows]
    caches: list[KVCache] = []
    sites = dropouts(model)
    for step in range(options.max_new_tokens):
        quiet = not any(site.training for site in sites)
        # Not around `yield`: the caller may do anything in between.
        with nullcontext() if quiet else evaluating(model):
            full = [i for i, row in enumerate(rows) if len(row) - begins[i] > context]
            if not caches or full:
                for i in full:
                    begins[i] = len(rows[i]) - max(1, context // 2)
                ids, real = pad_left(
                    [row[at:] for row, at in zip(rows, begins, strict=True)], device
                )
                caches = [DecodingCache(each, len(rows)) for each in members_of(model)]
            logits = next_logits(model, ids, real, caches)
        if not logits.isfinite().all():
            raise DivergedError("the model's logits are not finite")
        if step % CHANCES == 0:
            steps = np.arange(step, step + CHANCES)
            drawn = np.stack([uniform(name, steps) for name in names], axis=1)  # (CHANCES, B)
            chances = torch.from_numpy(drawn)
        tokens = draw(probabilities(logits, seen, options, never), chances[step % CHANCES])
        ids, real = tokens[:, None].to(device), None
        if options.repetition_penalty != 1:
            seen.scatter_(1, ids, True)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        yield tokens.tolist()


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
        self.prompts, self.unseen = prompts, unseen
        ids = [encode_prompt(text, prompt, documents, unseen=unseen) for prompt in prompts]
        self.index = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
        self.rows = [ids[p] for p, _ in self.index]
        texts = [hashlib.blake2b(np.array(row).tobytes()).hexdigest() for row in ids]
        self.names = [key(seed, "sample", texts[p], s) for p, s in self.index]
        self.streams = [TextStream(text, stops) for _ in self.index]

    def pieces(self) -> Iterator[Piece]:
        """Text as it becomes certain; ends when every continuation has ended."""
        step = continuations(
            self.model, self.rows, self.names, self.options, self.context, self.unseen
        )
        for tokens in step:
            for (p, s), stream, token in zip(self.index, self.streams, tokens, strict=True):
                if text := stream.feed(token):
                    yield Piece(p, s, text)
            if all(stream.finished for stream in self.streams):
                return
        for (p, s), stream in zip(self.index, self.streams, strict=True):
            if text := stream.end("length"):
                yield Piece(p, s, text)

    def results(self) -> list[dict[str, Any]]:
        """Everything at once: prompt, text, tokens and why each ended."""
        texts = {index: "" for index in self.index}
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
            for (p, s), stream in zip(self.index, self.streams, strict=True)
        ]


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

"""What a model knows by heart: training text that it goes on with word for word.

A window of text is memorised if the likeliest token, again and again, is the one that follows there
(Carlini et al., arXiv:2202.07646: "extractable" with a prompt of k tokens). Held-out text is the
control: what of it is continued word for word was guessed, not remembered.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlite.config.run import SampleConfig
from gptlite.core.generate import continuations, encode_prompt
from gptlite.core.language_model import LanguageModel
from gptlite.data.batches import Tokens
from gptlite.keys import key
from gptlite.measure.intervals import Floats, mean_per_target, share

PROMPT, CONTINUED = 50, 50
"""Tokens that a window begins with, and that have to follow; half as many of a short context."""
AT_ONCE = 64
"""Windows that are continued together."""
SAMPLES, SAMPLE_TOKENS = 16, 200
MOST_SEARCHED = 1 << 24
"""Tokens of training text, its first, in which spans are looked for."""
Ids = NDArray[np.int64]


class Windows(NamedTuple):
    """Pieces of text, (n, PROMPT) and (n, CONTINUED)."""

    prompts: Ids
    following: Ids


def cut_windows(tokens: Tokens, n: int, half: int, eot: int | None) -> Windows:
    """About n pieces of 2 * half tokens, spread over a split, none into another document."""
    last = len(tokens) - 2 * half
    starts = sorted({round(last * i / max(1, n - 1)) for i in range(n)}) if last >= 0 else []
    pieces = [np.asarray(tokens[at : at + 2 * half], dtype=np.int64) for at in starts]
    whole = [piece for piece in pieces if eot is None or not (piece[1:] == eot).any()]
    found = np.stack(whole) if whole else np.empty((0, 2 * half), np.int64)
    return Windows(found[:, :half], found[:, half:])


def matched_tokens(of: LanguageModel, windows: Windows, watch: Callable[..., Any]) -> Floats:
    """Of each window, how many tokens in a row the model continues as the text does, (n,)."""
    n = windows.following.shape[1]
    options = SampleConfig(max_new_tokens=n, temperature=0)
    found = []
    for start in watch(range(0, len(windows.prompts), AT_ONCE), "memorisation"):
        prompts = windows.prompts[start : start + AT_ONCE].tolist()
        names = list(range(start, start + len(prompts)))
        steps = list(continuations(of.model, prompts, names, options, of.context_length))
        same = windows.following[start : start + AT_ONCE] == np.array(steps).T
        found.append(np.cumprod(same, axis=1).sum(1))
    return np.concatenate(found).astype(np.float64)


def describe(matched: Floats, n: int, name: str) -> dict[str, Any]:
    """The share of windows that are continued word for word, and how far they are on average."""
    return {
        "windows": len(matched),
        "verbatim": share(int((matched == n).sum()), len(matched)),
        "matched_tokens": mean_per_target(matched, np.ones_like(matched), name),
    }


class Haystack:
    """Text in which spans of tokens are looked for."""

    def __init__(self, tokens: Tokens) -> None:
        self.n = min(len(tokens), MOST_SEARCHED)
        self.bytes = np.asarray(tokens[: self.n]).astype("<u4").tobytes()

    def has(self, ids: Ids) -> bool:
        wanted, at = ids.astype("<u4").tobytes(), -1
        while (at := self.bytes.find(wanted, at + 1)) >= 0:
            if at % 4 == 0:
                return True
        return False

    def longest_span(self, ids: Ids) -> tuple[int, int]:
        """(tokens, where they begin in ids) of the longest piece of ids that is in the text."""
        best = begin = 0
        for start in range(len(ids)):
            while start + best < len(ids) and self.has(ids[start : start + best + 1]):
                best, begin = best + 1, start
        return best, begin


def draw_samples(of: LanguageModel, n: int, length: int) -> list[Ids]:
    """Texts from nothing, as the run samples them, up to their end."""
    options = of.run.sample.model_copy(update={"max_new_tokens": length})
    documents, unseen = of.run.data.layout == "documents", of.unseen
    first = encode_prompt(of.tokenizer, "", documents, unseen=unseen)
    names = [key(of.run.seed, "memorisation", sample) for sample in range(n)]
    steps = list(continuations(of.model, [first] * n, names, options, of.context_length, unseen))
    return [before_end(row, of.tokenizer.eot) for row in np.array(steps).T]


def before_end(ids: Ids, eot: int | None) -> Ids:
    """What comes before the end of the text, if it ends."""
    if eot is None:
        return ids
    ended = ids == eot
    return ids[: int(ended.argmax())] if ended.any() else ids


def spread_stretches(tokens: Tokens, lengths: Iterable[int]) -> Iterator[Ids]:
    """Pieces of a split of these lengths, spread over it."""
    wanted = list(lengths)
    for number, length in enumerate(wanted):
        start = number * max(0, len(tokens) - length) // max(1, len(wanted) - 1)
        yield np.asarray(tokens[start : start + length], dtype=np.int64)


def memorisation(
    of: LanguageModel, train: Tokens, held_out: Tokens, n_windows: int, watch: Callable[..., Any]
) -> dict[str, Any]:
    """Windows of both splits, and spans in samples. A split without a window is a note."""
    half = min(PROMPT, of.context_length // 2)
    found: dict[str, Any] = {"prompt_tokens": half, "continued_tokens": half}
    for name, tokens in (("train", train), ("val", held_out)):
        windows = cut_windows(tokens, n_windows, half, of.tokenizer.eot)
        if not len(windows.prompts):
            found[name] = {"note": f"no document of {2 * half} tokens"}
            continue
        matched = matched_tokens(of, windows, watch)
        found[name] = describe(matched, half, f"memorisation {name}")
    return {**found, "spans": measure_spans(of, train, held_out)}


def measure_spans(of: LanguageModel, train: Tokens, held_out: Tokens) -> dict[str, Any]:
    """The longest pieces of samples that are in the training text; those of held-out text of the
    same lengths are what any text of that kind has."""
    text, samples = Haystack(train), draw_samples(of, SAMPLES, SAMPLE_TOKENS)
    spans = [text.longest_span(ids) for ids in samples]
    others = [text.longest_span(ids)[0] for ids in spread_stretches(held_out, map(len, samples))]
    longest, begin = max(spans, key=lambda span: span[0])
    where = samples[spans.index((longest, begin))][begin : begin + longest]
    return {
        "samples": len(samples),
        "sample_tokens": int(sum(map(len, samples))),
        "searched_tokens": text.n,
        "longest_span": longest,
        "longest_text": b"".join(map(of.tokenizer.token_bytes, where.tolist())).decode(
            errors="replace"
        ),
        "mean_longest_span": float(np.mean([span for span, _ in spans])),
        "held_out_longest_span": max(others),
        "held_out_mean_longest_span": float(np.mean(others)),
    }

"""The one thread in which models work: completions in running batches, and single calls between.

Requests come from the event loop and hear back through it; nothing else touches the models, so a
picture that hooks into a model never meets a text that it writes. Models are loaded here, too:
where another thread has worked in parallel before, OpenMP counts more threads than cores and lets
those that wait sleep at once: a token of a 10 M model took 4.5 ms instead of 3.6.
"""

import asyncio
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptlite.config.run import SampleConfig
from gptlite.core.generate import TextStream, halve
from gptlite.core.model import GPT
from gptlite.core.running_batch import Row, RunningBatch
from gptlite.errors import ConfigError, UserError
from gptlite.runs.trained import Trained

CHUNKS_A_STEP = 1
"""Of prompts that are read between two tokens: a long prompt delays who is writing by as much."""


class Busy(Exception):
    """The queue is full; try again later."""


@dataclass(frozen=True)
class Token:
    """One new token of a completion."""

    id: int
    logprob: float | None
    """Natural logarithm of its probability at temperature 1; None: nothing was before it."""
    likeliest: list[tuple[int, float]]
    """As many as were asked for, with theirs."""


@dataclass(frozen=True)
class News:
    """What is new of one completion: text that is certain, and why it ended if it has."""

    index: int
    text: str
    token: Token | None
    finished: str


@dataclass(eq=False)
class Job:
    """One prompt and its completions, one for each key of draws in `names`."""

    model: str
    ids: list[int]
    names: list[int]
    options: SampleConfig
    stops: Sequence[str]
    n_logprobs: int | None
    """Alternatives of each token that are wanted; None: not even its own probability."""
    first_index: int
    news: asyncio.Queue[list[News] | Exception]
    """Where it hears of what is written, in the event loop it was made in."""
    streamed: bool = True
    """Whether it hears of each token at once, or of all of a completion at its end."""
    unsaid: list[News] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    queued_at: float = field(default_factory=time.perf_counter)
    begun: bool = False
    gone: bool = False
    """Nobody waits for it any more."""


@dataclass(eq=False)
class Writing:
    """A row of a batch and the completion it belongs to."""

    job: Job
    index: int
    stream: TextStream


class ServedModel:
    """A trained model, its running batch, and what is written in it."""

    def __init__(self, name: str, trained: Trained, most_rows: int, text: str = "") -> None:
        self.name, self.trained, self.most_rows = name, trained, most_rows
        self.text = text
        """A few words that it knows, for the page to begin with."""
        self.generator: GPT = trained.model
        if trained.run.dtype == "bfloat16":
            self.generator = copy.deepcopy(trained.model)
            halve(self.generator)
        self.batch = RunningBatch(self.generator, most_rows, trained.context_length, trained.unseen)
        self.writing: dict[Row, Writing] = {}

    def begin(self, job: Job) -> None:
        rows = self.batch.join(job.ids, job.names, job.options)
        for index, row in enumerate(rows, job.first_index):
            stream = TextStream(self.trained.tokenizer, job.stops)
            self.writing[row] = Writing(job, index, stream)

    def end(self, row: Row) -> None:
        self.batch.leave(row)
        del self.writing[row]

    def step(self) -> list[tuple[Job, News]]:
        """One token for each row."""
        for row in [row for row, of in self.writing.items() if of.job.gone]:
            self.end(row)
        news = []
        rows, logits = self.batch.step(CHUNKS_A_STEP)
        for row, own in zip(rows, logits, strict=True):
            of = self.writing[row]
            text = of.stream.feed(row.ids[-1])
            if of.stream.n_tokens == row.options.max_new_tokens:
                text += of.stream.end("length")
            token = None
            if of.job.n_logprobs is not None:
                token = describe_token(row.ids[-1], own, of.job.n_logprobs)
            news.append((of.job, News(of.index, text, token, of.stream.finished)))
            if of.stream.finished:
                self.end(row)
        return news


def describe_token(token: int, logits: Tensor, n: int) -> Token:
    """A token beside the n likeliest, from logits (V,)."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    likeliest = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), likeliest)


@torch.no_grad()
def describe_prompt(model: ServedModel, ids: Sequence[int], n: int) -> list[Token]:
    """The tokens of a prompt, each with what was likeliest there. Raises ConfigError."""
    most = model.trained.context_length
    if len(ids) > most:
        raise ConfigError(f"prompt: {len(ids)} tokens; echo with logprobs reads at most {most}")
    device = model.generator.token_embedding.weight.device
    logits = model.generator(torch.tensor([list(ids)], device=device))[0].float()
    told = [describe_token(i, own, n) for i, own in zip(ids[1:], logits, strict=False)]
    return [Token(ids[0], None, []), *told]


class Engine:
    """Models by name; `most_waiting` jobs may wait beside those for which there is a place."""

    def __init__(self, most_waiting: int, watch: Any = None) -> None:
        self.models: dict[str, ServedModel] = {}
        self.most_waiting, self.watch = most_waiting, watch
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def load(self, make: Callable[[], Sequence[ServedModel]]) -> None:
        """Models that are made in the engine's thread. Raises what `make` raises."""

        def add() -> None:
            self.models.update({model.name: model for model in make()})

        self.call(add).result()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none. Raises Busy."""
        with self.changed:
            model = self.models[jobs[0].model]
            free = model.most_rows - len(model.writing)
            if len(self.waiting) + len(jobs) > self.most_waiting + free:
                raise Busy
            self.waiting.extend(jobs)
            self.changed.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Its result, computed in the engine's thread between two steps. Raises Busy."""
        future: Future[Any] = Future()
        with self.changed:
            if len(self.calls) >= self.most_waiting:
                raise Busy
            self.calls.append((function, future))
            self.changed.notify()
        return future

    @property
    def n_writing(self) -> int:
        return sum(len(model.writing) for model in self.models.values())

    def run(self) -> None:
        while True:
            with self.changed:
                while not (self.closed or self.waiting or self.calls or self.n_writing):
                    self.changed.wait()
                if self.closed:
                    return
                started = self.take_jobs()
                call = self.calls.popleft() if self.calls else None
            for job in started:
                self.models[job.model].begin(job)
            if call is not None:
                answer(*call)
            for model in list(self.models.values()):
                if model.writing:
                    self.step(model)

    def take_jobs(self) -> list[Job]:
        """Those for which there is room now, in the order in which they came."""
        free = {name: model.most_rows - len(model.writing) for name, model in self.models.items()}
        taken: list[Job] = []
        for job in list(self.waiting):
            if job.gone:
                self.waiting.remove(job)
            elif len(job.names) <= free[job.model]:
                free[job.model] -= len(job.names)
                self.waiting.remove(job)
                taken.append(job)
            else:
                free[job.model] = 0  # who came later does not overtake
        return taken

    def step(self, model: ServedModel) -> None:
        try:
            news = model.step()
        except Exception as error:  # noqa: BLE001 - each that waits must hear of it
            jobs = {of.job for of in model.writing.values()}
            for row in list(model.writing):
                model.end(row)
            why = error if isinstance(error, UserError) else RuntimeError(f"{error!r:.200}")
            for job in jobs:
                job.loop.call_soon_threadsafe(job.news.put_nowait, why)
            return
        if self.watch is not None:
            self.watch.count_tokens(model.name, news)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[News]]]] = {}
        for job, one in news:
            job.unsaid.append(one)
            if job.streamed or one.finished:
                by_loop.setdefault(job.loop, []).append((job, job.unsaid))
                job.unsaid = []
        for loop, of_loop in by_loop.items():
            loop.call_soon_threadsafe(deliver, of_loop)


def deliver(news: list[tuple[Job, list[News]]]) -> None:
    for job, some in news:
        job.news.put_nowait(some)


def answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - it belongs to who asked
        future.set_exception(error)

"""`/v1/completions` and `/v1/chat/completions`: OpenAI's requests to jobs, and news to answers.

A field that is not known is an error, not ignored. What is left out is as the run's config has it.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptlite.config.reader import lay_sample_options
from gptlite.config.run import SampleConfig
from gptlite.core.generate import encode_prompt, sample_names
from gptlite.errors import ConfigError
from gptlite.runs.trained import Trained
from gptlite.serve.engine import Job, News, Token

SEED = 1337
"""Of `gptlite generate`."""
MOST_PROMPTS, MOST_SAMPLES, MOST_STOPS, MOST_LOGPROBS = 64, 64, 16, 20
ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "developer": "System"}
Ids = Annotated[list[int], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=0, le=0)]
"""OpenAI's penalties, which are another thing than repetition_penalty: only none."""
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]


class Asked(BaseModel):
    """What both kinds of request may say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    n: int | None = Field(1, ge=1, le=MOST_SAMPLES)
    stream: bool | None = False
    stream_options: dict[str, bool] | None = None
    stop: Annotated[str, Field(min_length=1)] | Stops | None = None
    seed: int | None = Field(SEED, ge=0, lt=2**63)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(Asked):
    prompt: str | list[str] | Ids | list[Ids] | None = ""
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = "" if self.prompt is None else self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "user", "assistant", "developer"]
    content: str


class ChatRequest(Asked):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def as_text(self) -> str:
        """The template: a line for each message, with who speaks, and one that is begun."""
        lines = [f"{ROLES[message.role]}: {message.content}\n" for message in self.messages]
        return "".join([*lines, "Assistant:"])


def read_request(kind: type[BaseModel], body: Any) -> Any:
    """Raises ConfigError with the field that cannot be meant."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        path = [str(part) for part in detail["loc"] if not isinstance(part, str) or "[" not in part]
        place = path[0] if path else "body"
        if detail["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ConfigError(f"{place}: not a field; known here: {known}") from None
        if detail["type"] == "model_type":
            raise ConfigError("body: must be a JSON object") from None
        raise ConfigError(f"{place}: {detail['msg']}") from None


@dataclass
class Task:
    """The jobs of one request, and what its answer needs."""

    chat: bool
    asked: Any
    model: str
    trained: Trained
    jobs: list[Job]
    prompts: list[str]
    echo: bool = False
    prompt_tokens: list[list[Token]] = field(default_factory=list)
    """Of each prompt that is echoed with its probabilities."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def writes_nothing(self) -> bool:
        """Only the prompts are wanted back, with what is asked of their tokens."""
        return not self.chat and self.asked.max_tokens == 0

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(job.ids) for job in self.jobs)


def options_of(
    asked: Asked, trained: Trained, most_tokens: int, wanted: int | None
) -> SampleConfig:
    """What is asked for, laid over the run's own. Raises ConfigError."""
    given = {
        name: getattr(asked, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    if wanted is not None and wanted > most_tokens:
        raise ConfigError(f"max_tokens: {wanted} is above {most_tokens}, this server's limit")
    own = min(trained.run.sample.max_new_tokens, most_tokens)
    given["max_new_tokens"] = max(1, own if wanted is None else wanted)
    return lay_sample_options(trained.run.sample.model_copy(update={"prompts": ()}), given)


def make_task(
    asked: CompletionRequest | ChatRequest, model: str, trained: Trained, most_tokens: int
) -> Task:
    """The jobs that a request makes. Raises ConfigError."""
    documents = trained.run.data.layout == "documents"
    if isinstance(asked, ChatRequest):
        wanted = asked.max_completion_tokens or asked.max_tokens
        prompts: list[Any] = [asked.as_text]
        stops = [*asked.stops, "\nUser:"]
        n_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ConfigError("top_logprobs: needs logprobs: true")
    else:
        wanted, prompts, stops = asked.max_tokens, asked.prompts, asked.stops
        n_logprobs = asked.logprobs
        if asked.best_of not in (None, 1, asked.n):
            raise ConfigError("best_of: is not done here; leave it out")
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise ConfigError(f"prompt: {len(prompts)} prompts; give 1 to {MOST_PROMPTS}")
        if wanted == 0 and not asked.echo:
            raise ConfigError("max_tokens: 0 only with echo: true")
    options = options_of(asked, trained, most_tokens, wanted)
    n, seed = asked.n or 1, SEED if asked.seed is None else asked.seed
    jobs, news = [], asyncio.Queue[list[News] | Exception]()
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = encode_prompt(
                trained.tokenizer, prompt, documents, place="prompt", unseen=trained.unseen
            )
        else:
            ids = check_ids(prompt, trained.tokenizer.vocab_size)
        names = sample_names(seed, ids, n)
        first, streamed = number * n, bool(asked.stream)
        jobs.append(Job(model, ids, names, options, stops, n_logprobs, first, news, streamed))
    texts = [
        prompt if isinstance(prompt, str) else trained.tokenizer.decode(prompt)
        for prompt in prompts
    ]
    chat = isinstance(asked, ChatRequest)
    echo = isinstance(asked, CompletionRequest) and bool(asked.echo)
    return Task(chat, asked, model, trained, jobs, texts, echo)


def check_ids(ids: list[int], vocab_size: int) -> list[int]:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ConfigError(f"prompt: token {i}; the model has tokens 0 to {vocab_size - 1}")
    return ids


@dataclass
class Choice:
    """One completion as far as it has come."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    n_tokens: int = 0
    finished: str = ""

    def add(self, news: News) -> None:
        if news.token is not None:
            self.tokens.append(news.token)
            self.offsets.append(len(self.text))
        self.text += news.text
        self.n_tokens += 1
        self.finished = news.finished


def reason(finished: str) -> str | None:
    """Why a completion ended, in OpenAI's words."""
    if not finished:
        return None
    return "length" if finished == "length" else "stop"


def name_token(task: Task, token: int) -> str:
    return task.trained.tokenizer.decode([token])


def completion_logprobs(
    task: Task, tokens: Sequence[Token], offsets: Sequence[int]
) -> dict[str, Any]:
    return {
        "tokens": [name_token(task, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            # Several tokens may be one text, such as halves of characters: the likeliest counts.
            {name_token(task, i): value for i, value in reversed(token.likeliest)} or None
            for token in tokens
        ],
        "text_offset": list(offsets),
    }


def chat_logprobs(task: Task, tokens: Sequence[Token]) -> dict[str, Any]:
    def describe(token: int, logprob: float | None) -> dict[str, Any]:
        raw = task.trained.tokenizer.token_bytes(token)
        return {"token": name_token(task, token), "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **describe(token.id, token.logprob),
            "top_logprobs": [describe(i, value) for i, value in token.likeliest],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def answer_choice(task: Task, choice: Choice) -> dict[str, Any]:
    """One completion as it ended."""
    wanted = task.jobs[0].n_logprobs is not None
    common = {"index": choice.index, "finish_reason": reason(choice.finished)}
    if task.chat:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = chat_logprobs(task, choice.tokens) if wanted else None
        return {**common, "message": message, "logprobs": logprobs}
    logprobs = completion_logprobs(task, choice.tokens, choice.offsets) if wanted else None
    return {**common, "text": choice.text, "logprobs": logprobs}


def answer_head(task: Task, *, streamed: bool) -> dict[str, Any]:
    kind = "text_completion"
    if task.chat:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
    name = f"chatcmpl-{task.id}" if task.chat else f"cmpl-{task.id}"
    return {"id": name, "object": kind, "created": task.created, "model": task.model}


def usage_of(task: Task, choices: Sequence[Choice]) -> dict[str, int]:
    new = sum(choice.n_tokens for choice in choices)
    known = task.n_prompt_tokens
    return {"prompt_tokens": known, "completion_tokens": new, "total_tokens": known + new}


def start_choices(task: Task) -> dict[int, Choice]:
    """A choice for each completion, with its prompt where it is to be echoed."""
    choices = {}
    for number, (job, prompt) in enumerate(zip(task.jobs, task.prompts, strict=True)):
        for index in range(job.first_index, job.first_index + len(job.names)):
            choice = Choice(index, prompt if task.echo else "")
            if task.prompt_tokens:
                choice.tokens = list(task.prompt_tokens[number])
                names = [name_token(task, token.id) for token in choice.tokens]
                choice.offsets = [len("".join(names[:at])) for at in range(len(names))]
            choices[index] = choice
    return choices


async def news_of(task: Task) -> AsyncIterator[News]:
    """Of all jobs of a task, until each completion has ended. Raises what went wrong."""
    left = 0 if task.writes_nothing else sum(len(job.names) for job in task.jobs)
    while left:
        some = await task.jobs[0].news.get()
        if isinstance(some, Exception):
            raise some
        for news in some:
            left -= bool(news.finished)
            yield news


async def whole_answer(task: Task, choices: dict[int, Choice]) -> dict[str, Any]:
    async for news in news_of(task):
        choices[news.index].add(news)
    ordered = list(choices.values())
    for choice in ordered:
        choice.finished = choice.finished or "length"
    return {
        **answer_head(task, streamed=False),
        "choices": [answer_choice(task, choice) for choice in ordered],
        "usage": usage_of(task, ordered),
    }


def as_event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def piece_of(task: Task, choice: Choice, news: News) -> dict[str, Any]:
    """One chunk's choice."""
    tokens = [] if news.token is None else [news.token]
    common = {"index": choice.index, "finish_reason": reason(news.finished)}
    wanted = task.jobs[0].n_logprobs is not None
    if task.chat:
        logprobs = chat_logprobs(task, tokens) if wanted else None
        return {**common, "delta": {"content": news.text}, "logprobs": logprobs}
    offsets = choice.offsets[-1:] if tokens else []
    logprobs = completion_logprobs(task, tokens, offsets) if wanted else None
    return {**common, "text": news.text, "logprobs": logprobs}


def first_pieces(task: Task, choices: dict[int, Choice]) -> Iterator[dict[str, Any]]:
    """What stands before the first token of each completion."""
    for choice in choices.values():
        common = {"index": choice.index, "finish_reason": None, "logprobs": None}
        if task.chat:
            yield {**common, "delta": {"role": "assistant", "content": ""}}
        elif task.echo:
            yield {**answer_choice(task, choice), "finish_reason": None}


async def streamed_answer(task: Task, choices: dict[int, Choice]) -> AsyncIterator[str]:
    """Server-sent events, the last of which is [DONE]."""
    head = answer_head(task, streamed=True)
    more = {"usage": None} if task.asked.wants_usage else {}
    for piece in first_pieces(task, choices):
        yield as_event({**head, "choices": [piece], **more})
    async for news in news_of(task):
        choice = choices[news.index]
        choice.add(news)
        if news.text or news.token is not None or news.finished:
            piece = piece_of(task, choice, news)
            yield as_event({**head, "choices": [piece], **more})
    if task.asked.wants_usage:
        usage = usage_of(task, list(choices.values()))
        yield as_event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"

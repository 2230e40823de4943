"""The HTTP service: paths, and how questions and answers travel. Errors are OpenAI's JSON."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gptlite import __version__
from gptlite.errors import UserError
from gptlite.serve import completions, studio
from gptlite.serve.completions import ChatRequest, Choice, CompletionRequest, Task
from gptlite.serve.counters import Counters
from gptlite.serve.engine import Busy, Engine, ServedModel, describe_prompt
from gptlite.serve.guard import Guard, Refusal
from gptlite.serve.watch import Watch

PAGE = Path(__file__).with_name("page.html")
EVENTS = "text/event-stream; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    most_tokens: int
    """New tokens of a completion."""
    most_body_bytes: int
    most_seconds: float
    """From a request to the end of its answer."""


class Service:
    """The paths' functions, and what they share."""

    def __init__(
        self,
        directories: dict[str, Path],
        *,
        limits: Limits,
        most_waiting: int,
        train_demo: Callable[[], dict[str, Path]] | None = None,
        load_demo: Callable[[dict[str, Path]], Sequence[ServedModel]] | None = None,
    ) -> None:
        self.counters = Counters()
        self.engine = Engine(most_waiting, self.counters)
        self.limits, self.train_demo, self.load_demo = limits, train_demo, load_demo
        self.directories = directories
        self.watch = Watch(directories.values())
        self.demo_lock = asyncio.Lock()
        self.page = PAGE.read_text()
        self.policy = content_policy(self.page)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.engine.close)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.show_model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/api/models", self.describe_models),
            Route("/api/runs", self.list_runs),
            Route("/api/runs/{name:path}", self.show_run),
            Route("/api/look", self.look, methods=["POST"]),
            Route("/api/without", self.without, methods=["POST"]),
            Route("/api/demo", self.demo, methods=["POST"]),
        ]

    def choose(self, name: str | None) -> ServedModel:
        """The model that is named, or the only one. Raises Refusal."""
        models = self.engine.models
        if name is None and models:
            return next(iter(models.values()))
        if name not in models:
            known = ", ".join(models) or "none is loaded"
            raise Refusal(404, f"model: {name!r:.100} is not here; here: {known}", param="model")
        return models[name]

    async def show_page(self, _: Request) -> Response:
        return HTMLResponse(self.page, headers={"content-security-policy": self.policy})

    async def health(self, _: Request) -> Response:
        alive = self.engine.thread.is_alive()
        status = {"status": "ok" if alive else "stopped", "version": __version__}
        return JSONResponse(status, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        text = self.counters.as_text(self.engine.n_writing, len(self.engine.waiting))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_models(self, _: Request) -> Response:
        data = [model_entry(name) for name in self.engine.models]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(model_entry(self.choose(request.path_params["name"]).name))

    async def complete(self, request: Request) -> Response:
        return await self.write(request, CompletionRequest)

    async def chat(self, request: Request) -> Response:
        return await self.write(request, ChatRequest)

    async def write(self, request: Request, kind: type[completions.Asked]) -> Response:
        """Completions, whole or as they come."""
        asked = completions.read_request(kind, await read_json_body(request))
        model = self.choose(asked.model)
        task = completions.make_task(asked, model.name, model.trained, self.limits.most_tokens)
        if len(task.jobs[0].names) > model.most_rows:
            raise Refusal(400, f"n: at most {model.most_rows} here", param="n")
        if task.echo and isinstance(n_logprobs := task.jobs[0].n_logprobs, int):
            for job in task.jobs:
                find = partial(describe_prompt, model, job.ids, n_logprobs)
                task.prompt_tokens.append(await self.ask(find))
        choices = completions.start_choices(task)
        if not task.writes_nothing:
            self.engine.submit(task.jobs)
        if asked.stream:
            return StreamingResponse(self.stream(task, choices), media_type=EVENTS)
        leaving = asyncio.ensure_future(wait_for_leaving(request))
        writing = asyncio.ensure_future(completions.whole_answer(task, choices))
        try:
            await asyncio.wait(
                (leaving, writing),
                timeout=self.limits.most_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not writing.done():
                raise self.too_long()
            return JSONResponse(writing.result())
        finally:
            leaving.cancel()
            writing.cancel()
            give_up(task)

    def too_long(self) -> Refusal:
        why = f"not done in {self.limits.most_seconds:g} seconds; ask for fewer tokens"
        return Refusal(503, why, "timeout")

    async def stream(self, task: Task, choices: dict[int, Choice]) -> AsyncIterator[str]:
        """The events of an answer; an error is one of them, as the status is already sent."""
        events = completions.streamed_answer(task, choices)
        end = asyncio.get_running_loop().time() + self.limits.most_seconds
        try:
            # Not a timeout around all: it would end whatever sends the event just then.
            while True:
                left = end - asyncio.get_running_loop().time()
                yield await asyncio.wait_for(anext(events), max(0.0, left))
        except StopAsyncIteration:
            pass
        except TimeoutError:
            yield completions.as_event(self.too_long().body)
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            yield completions.as_event(refusal_of(error).body)
        finally:
            give_up(task)

    async def ask(self, function: Callable[[], Any]) -> Any:
        """What the engine's thread makes of it. Raises what it raises, and Busy."""
        return await asyncio.wrap_future(self.engine.call(function))

    async def describe_models(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.models_of_page))

    def models_of_page(self) -> dict[str, Any]:
        models = [
            studio.describe_model(model, self.directories.get(name))
            for name, model in list(self.engine.models.items())
        ]
        return {"models": models, "demo": self.train_demo is not None}

    async def list_runs(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.watch.list_runs))

    async def show_run(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = await run_in_threadpool(self.watch.describe, name)
        if found is None:
            raise Refusal(404, f"run: {name!r:.100} is not under runs/ nor served")
        return JSONResponse(found)

    async def look(self, request: Request) -> Response:
        asked = completions.read_request(studio.Look, await read_json_body(request))
        model = self.choose(asked.model)
        find = studio.make_look(model, self.directories.get(model.name), asked)
        return JSONResponse(await self.ask(find))

    async def without(self, request: Request) -> Response:
        asked = completions.read_request(studio.Without, await read_json_body(request))
        return JSONResponse(await self.ask(studio.make_without(self.choose(asked.model), asked)))

    async def demo(self, _: Request) -> Response:
        """Two small models, trained now, once."""
        async with self.demo_lock:
            if self.train_demo is not None and self.load_demo is not None:
                found = await run_in_threadpool(self.train_demo)
                await run_in_threadpool(self.engine.load, partial(self.load_demo, found))
                self.directories.update(found)
                self.watch.named += found.values()
                self.train_demo = None
        return await self.describe_models(_)


def model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gptlite"}


async def read_json_body(request: Request) -> Any:
    """Raises Refusal for what is not JSON."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(400, "body: is not JSON") from None


async def wait_for_leaving(request: Request) -> None:
    """Until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def give_up(task: Task) -> None:
    """Whatever is still written for it makes room."""
    for job in task.jobs:
        job.gone = True


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Busy):
        return Refusal(429, "the server is busy; try again in a moment", "rate_limit_error")
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, error.detail)
    if isinstance(error, UserError):
        message = "; ".join(error.problems).removeprefix("--")
        return Refusal(400, message, param=re.split(r"[: ]", message)[0])
    return Refusal(500, f"{type(error).__name__} (a bug of gptlite)", "server_error")


async def answer_error(_: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    headers = {"retry-after": "1"} if refusal.status in (429, 503) else None
    return JSONResponse(refusal.body, refusal.status, headers)


def content_policy(page: str) -> str:
    """Only what stands in the page itself may run or style it, and it may ask only here."""

    def digests(tag: str) -> str:
        parts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.S)
        hashes = (hashlib.sha256(part.encode()).digest() for part in parts)
        return " ".join(f"'sha256-{base64.b64encode(found).decode()}'" for found in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def make_app(
    service: Service, *, hosts: Sequence[str] | None = None, token: str | None = None
) -> Starlette:
    """The application; only for these names of the server, only with this token."""
    guard = Middleware(
        Guard, hosts=hosts, token=token, most_body_bytes=service.limits.most_body_bytes
    )
    counting = Middleware(Counting, counters=service.counters)
    kinds = (Refusal, Busy, UserError, HTTPException, Exception)
    return Starlette(
        routes=service.routes(),
        middleware=[counting, guard],
        exception_handlers=dict.fromkeys(kinds, answer_error),
        lifespan=service.lifespan,
    )


class Counting:
    """ASGI middleware: answers by path and status."""

    def __init__(self, app: Any, counters: Counters) -> None:
        self.app, self.counters = app, counters

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_and_count(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.counters.answers.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, send_and_count if scope["type"] == "http" else send)

"""`scripts/bench.py serve`: tokens per second of `gptlite serve` beside a plain transformers loop.

The peer is what one writes first: Hugging Face's `generate` on the same weights behind Starlette,
one request after the other. Both are processes of their own; clients keep their connections.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_peers import GPT2, row

SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256}
MODELS: dict[str, tuple[dict[str, Any], str, int]] = {
    "10 M": (SMALL, "byte", 64),
    "124 M": (GPT2, "tiktoken", 24),
}
"""Sizes, tokenizer, and new tokens of a request."""
CLIENTS = (1, 8, 32)
PROMPT = "The quick brown fox jumps over the lazy dog and then it goes home to its own children."


def train_nothing(folder: Path, sizes: dict[str, Any], tokenizer: str, dtype: str) -> Path:
    """A run of one update: what a text costs does not depend on what it says."""
    text = folder / "text.txt"
    text.write_text((PROMPT + "\n") * 400)
    sets = {f"model.{name}": value for name, value in sizes.items()}
    sets |= {"data.source": text, "data.cache_dir": folder / "cache", "tokenizer.kind": tokenizer}
    sets |= {"train.max_steps": 1, "train.batch_size": 1, "dtype": dtype, "dropout.rate": 0}
    sets |= {"sample.max_new_tokens": 1, "train.eval_interval": 1, "model.context_length": 256}
    sets |= {"optim.warmup_steps": 0, "train.micro_batch_size": 1}
    given = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    run = folder / f"run-{dtype}"
    base = Path(__file__).resolve().parents[1] / "configs" / "debug.yaml"
    command = [sys.executable, "-m", "gptlite", "train", "--config", str(base), *given]
    subprocess.run([*command, "--out-dir", str(run)], check=True, capture_output=True, cwd=folder)
    return run


@contextmanager
def running(*command: str) -> Iterator[tuple[str, int]]:
    """A server; its address, which is on the first line that it prints, and its process."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?/", process.stdout.readline())
        assert found is not None, f"{command[:6]} does not listen"
        yield found[0], process.pid
    finally:
        process.terminate()
        process.communicate()


def serve_transformers(model_dir: str) -> None:
    """The peer: `generate`, one request at a time."""
    import socket

    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(2)
    model, lock = GPT2LMHeadModel.from_pretrained(model_dir).eval(), threading.Lock()

    def write(ids: list[int], n: int) -> None:
        given = torch.tensor([ids])
        more: dict[str, Any] = {"min_new_tokens": n, "do_sample": True, "top_k": 0}
        with lock, torch.no_grad():
            mask = torch.ones_like(given)
            model.generate(given, attention_mask=mask, max_new_tokens=n, temperature=0.8, **more)

    async def complete(request: Request) -> JSONResponse:
        asked = await request.json()
        await run_in_threadpool(write, asked["prompt"], asked["max_tokens"])
        return JSONResponse({"usage": {"completion_tokens": asked["max_tokens"]}})

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    config = uvicorn.Config(app, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


async def load(url: str, ids: list[int], n_tokens: int, n_clients: int, seconds: float) -> float:
    """Tokens per second of so many clients, each of which asks again as soon as it is answered."""
    import httpx2

    end, done = time.perf_counter() + seconds, 0

    async def ask(seed: int) -> None:
        nonlocal done
        asked = {"prompt": ids, "max_tokens": n_tokens, "temperature": 0.8, "seed": seed}
        async with httpx2.AsyncClient(timeout=600) as client:
            while time.perf_counter() < end:
                answer = await client.post(f"{url}v1/completions", json=asked)
                answer.raise_for_status()
                done += answer.json()["usage"]["completion_tokens"]

    began = time.perf_counter()
    await asyncio.gather(*(ask(seed) for seed in range(n_clients)))
    return done / (time.perf_counter() - began)


async def first_token(url: str, ids: list[int]) -> float:
    """Seconds from a request to the first event of its answer."""
    import httpx2

    asked = {"prompt": ids, "max_tokens": 4, "stream": True}
    async with httpx2.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        async with client.stream("POST", f"{url}v1/completions", json=asked) as answer:
            async for _ in answer.aiter_lines():
                return time.perf_counter() - began
    raise AssertionError


def bench_serve(options: argparse.Namespace) -> Iterator[str]:
    """Tokens per second of all clients together, and the time to a first token."""
    yield row(
        ("model", "clients", "transformers", "gptlite, float32", "x", "gptlite, bfloat16", "x")
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    dtypes = ("float32",) if options.lesser else ("float32", "bfloat16")
    for name, (sizes, tokenizer, n_tokens) in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            runs = {dtype: train_nothing(folder, sizes, tokenizer, dtype) for dtype in dtypes}
            export = [sys.executable, "-m", "gptlite", "export", "--run", str(runs["float32"])]
            out = str(folder / "hf")
            subprocess.run([*export, "--out", out], check=True, capture_output=True)
            yield from bench_model(name, runs, out, tokenizer, n_tokens, options.repeats)


def bench_model(
    name: str, runs: dict[str, Path], hf: str, tokenizer: str, n_tokens: int, repeats: int
) -> Iterator[str]:
    ids = list(PROMPT.encode())[:32] if tokenizer == "byte" else list(range(1000, 1032))
    found: dict[tuple[str, int], list[float]] = {}
    waits: dict[str, list[float]] = {dtype: [] for dtype in runs}
    for _ in range(repeats):
        for who in ("transformers", *runs):
            serve = [
                sys.executable,
                "-m",
                "gptlite",
                "serve",
                str(runs.get(who, "")),
                "--port",
                "0",
            ]
            peer = [sys.executable, __file__, hf]
            with running(*(peer if who == "transformers" else serve)) as (url, _):
                asyncio.run(load(url, ids, 2, 1, 0.5))  # what is made at the first request
                if who in runs:
                    waits[who] += [asyncio.run(first_token(url, ids)) for _ in range(5)]
                for n in CLIENTS:
                    pace = asyncio.run(load(url, ids, n_tokens, n, 5.0))
                    found.setdefault((who, n), []).append(pace)
    for n in CLIENTS:
        cells = [name, str(n), f"{statistics.median(found['transformers', n]):,.0f}"]
        for dtype in ("float32", "bfloat16"):
            own = found.get((dtype, n), [])
            pairs = zip(own, found["transformers", n], strict=False)
            ratio = statistics.median([a / b for a, b in pairs]) if own else 0
            cells += [f"{statistics.median(own):,.0f}", f"{ratio:.1f}"] if own else ["", ""]
        yield row(cells)
    told = ", ".join(f"{1e3 * statistics.median(waits[d]):.0f} ms in {d}" for d in runs)
    yield row((name, "first token", told, "", "", "", ""))


SOAK = (100, 1_000, 2_500, 5_000, 10_000)
"""Completions after which the memory is read."""


def bench_soak(options: argparse.Namespace) -> Iterator[str]:
    """Memory of a server over 10,000 completions, streamed and not, some of them left early."""
    yield row(("completions", "resident memory, MB", "open files"))
    yield "|---:|---:|---:|"
    with tempfile.TemporaryDirectory() as place:
        run = train_nothing(Path(place), {**SMALL, "n_layer": 2, "n_embd": 96}, "byte", "float32")
        serve = [sys.executable, "-m", "gptlite", "serve", str(run), "--port", "0"]
        with running(*serve) as (url, process):
            for before, after in zip((0, *SOAK), SOAK, strict=False):
                asyncio.run(ask_many(url, range(before, after)))
                status = Path(f"/proc/{process}/status").read_text()
                resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])
                files = len(list(Path(f"/proc/{process}/fd").iterdir()))
                yield row((f"{after:,}", f"{resident / 1000:.0f}", str(files)))


async def ask_many(url: str, seeds: range) -> None:
    """Sixteen clients at a time; of every ten requests one is left before its end."""
    import httpx2

    waiting = iter(seeds)

    async def ask() -> None:
        async with httpx2.AsyncClient(timeout=600) as client:
            for seed in waiting:
                asked = {
                    "prompt": PROMPT[: 1 + seed % 60],
                    "max_tokens": 1 + seed % 24,
                    "seed": seed,
                }
                if seed % 2:
                    answer = await client.post(f"{url}v1/completions", json=asked)
                    answer.raise_for_status()
                    continue
                asked |= {"stream": True, "logprobs": 5}
                async with client.stream("POST", f"{url}v1/completions", json=asked) as events:
                    async for _ in events.aiter_lines():
                        if seed % 10 == 0:
                            break

    await asyncio.gather(*(ask() for _ in range(16)))


if __name__ == "__main__":
    serve_transformers(sys.argv[1])

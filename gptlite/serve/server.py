"""From run directories to a server that listens: loading what fits, sockets, and the end."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptlite.config.run import RunConfig
from gptlite.errors import ConfigError
from gptlite.machine import usable_memory_bytes
from gptlite.runs.demo import LINE, train_demo
from gptlite.runs.origin import load_run
from gptlite.runs.trained import load_tokenizer, load_trained
from gptlite.serve.engine import ServedModel

GIB = 1 << 30
SHARE_OF_MEMORY = 0.9
"""Of what this process may use, that weights and caches may take."""
DEMO_ROWS = 8
SECONDS_TO_ASK = 15
"""For a new connection to send its first request."""
SECONDS_TO_DRAIN = 60
"""For answers that have begun, when the server is told to end."""
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a server that only this machine reaches is called in requests."""


def name_models(directories: Sequence[Path]) -> dict[str, Path]:
    """Run directories by the names their models have here. Raises ConfigError for two of one."""
    named: dict[str, Path] = {}
    for directory in directories:
        name = directory.resolve().name
        if name in named:
            raise ConfigError(f"{directory}: {named[name]} has the same name; rename one of them")
        named[name] = directory
    return named


def cache_bytes(run: RunConfig) -> int:
    """Keys and values of one row."""
    model = run.model
    return 2 * 4 * model.n_layer * model.kv_heads * model.head_width * model.context_length


def load_models(
    named: dict[str, Path], checkpoint: str, most_rows: int, say: Callable[[str], None]
) -> list[ServedModel]:
    """Loaded if all fit into memory, with fewer rows at once where those would not.

    Raises ConfigError before anything is loaded, CheckpointError.
    """
    memory, need, rows_need = SHARE_OF_MEMORY * usable_memory_bytes(), 0, 0
    for directory in named.values():
        run = load_run([str(directory / "config.yaml")], to_train=False)
        n_parameters = run.model.n_parameters(load_tokenizer(directory).vocab_size)
        need += n_parameters * (6 if run.dtype == "bfloat16" else 4)
        rows_need += cache_bytes(run)
    if need + rows_need > memory:
        raise ConfigError(
            f"{', '.join(map(str, named.values()))}: need {(need + rows_need) / GIB:.1f} GiB to "
            f"serve, and {memory / GIB:.1f} may be used here; serve fewer or smaller models"
        )
    fit = min(most_rows, int((memory - need) / rows_need)) if rows_need else most_rows
    if fit < most_rows:
        say(f"--batch {most_rows}: {fit} completions at once are what fits into memory")
    return [
        ServedModel(name, load_trained(directory, checkpoint), fit)
        for name, directory in named.items()
    ]


@contextmanager
def demo_folder() -> Iterator[Callable[[], dict[str, Path]]]:
    """What trains the pair of small models, in a folder that goes with the server."""
    with tempfile.TemporaryDirectory(prefix="gptlite-demo-") as folder:

        def make() -> dict[str, Path]:
            return {path.name: path for path in train_demo(Path(folder), lambda _: None)}

        yield make


def load_demo(named: dict[str, Path]) -> list[ServedModel]:
    return [
        ServedModel(name, load_trained(path, "last"), DEMO_ROWS, LINE)
        for name, path in named.items()
    ]


class ImpatientProtocol(H11Protocol):
    """Closes connections that ask for nothing: a thousand of them cost a thousand sockets."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(SECONDS_TO_ASK, self.close_if_silent)

    def close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def allow_many_sockets() -> None:
    """As many open files as the system lets this process have without asking."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve_app(app: Any, host: str, port: int, said: Callable[[int], None]) -> None:
    """Serve until a signal comes, and let what has begun end. Raises ConfigError."""
    allow_many_sockets()
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=SECONDS_TO_DRAIN,
        h11_max_incomplete_event_size=16 * 1024,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise ConfigError(f"--port {port}: cannot listen at {host} ({why})") from None
    with listening:
        said(listening.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listening])

"""A service over a tiny run, asked through Starlette's client: no socket."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop

pytest.importorskip("starlette", reason="the serve extra is not installed")
from starlette.testclient import TestClient

from gptlite.runs.start import train
from gptlite.runs.trained import load_trained
from gptlite.serve.app import Limits, Service, make_app
from gptlite.serve.engine import ServedModel

LIMITS = Limits(most_tokens=500, most_body_bytes=100_000, most_seconds=60)
BROWSER = {"base_url": "http://localhost:8000"}


def train_tiny(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """A run of a few updates on characters."""
    workshop, directory = Workshop(folder), folder / name
    train(workshop.run(**{"tokenizer": {"kind": "char"}, **sections}), directory)
    return directory


def load_served(directory: Path, most_rows: int = 4) -> ServedModel:
    return ServedModel(directory.name, load_trained(directory, "best"), most_rows)


@contextmanager
def serving(
    *directories: Path,
    most_rows: int = 4,
    most_waiting: int = 8,
    limits: Limits = LIMITS,
    **guard: Any,
) -> Iterator[TestClient]:
    """A client of a service over these runs, which is `client.service`."""
    named = {directory.name: directory for directory in directories}
    service = Service(named, limits=limits, most_waiting=most_waiting)
    service.engine.start()
    service.engine.load(lambda: [load_served(directory, most_rows) for directory in directories])
    guard = {"hosts": ["localhost", "testserver"], **guard}
    app = make_app(service, **guard)
    with TestClient(app, raise_server_exceptions=False, **BROWSER) as client:
        client.service = service  # type: ignore[attr-defined]
        yield client

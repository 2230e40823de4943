"""The server as a process: who leaves, who is slow, who floods, and how it ends."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import train_tiny
from sockets import Served, read_all, serving_process
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.errors import ConfigError
from gptlite.runs.directory import RUNS
from gptlite.serve import server

LONG = {"prompt": "The", "max_tokens": 100_000, "stream": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    options = ("--batch", "2", "--queue", "2", "--max-tokens", "100000")
    with serving_process(str(tiny), *options, folder=tiny.parent) as served:
        yield served


def wait_until(served: Served, name: str, value: float) -> None:
    until = time.monotonic() + 20
    while served.gauge(name) != value:
        assert time.monotonic() < until, f"{name} is not {value}"
        time.sleep(0.02)


def test_who_leaves_makes_room_streamed_or_not(served: Served) -> None:
    for asked in (LONG, {**LONG, "stream": False}):
        connections = [served.send("/v1/completions", asked) for _ in range(3)]
        wait_until(served, "gptlite_writing", 2)
        wait_until(served, "gptlite_waiting", 1)
        for connection in connections:
            connection.close()
        wait_until(served, "gptlite_writing", 0)
        wait_until(served, "gptlite_waiting", 0)


def test_who_does_not_read_holds_up_nobody(served: Served) -> None:
    lazy = served.send("/v1/completions", LONG)
    wait_until(served, "gptlite_writing", 1)
    answer = read_all(served.send("/v1/completions", {"max_tokens": 5, "stream": True}))
    assert "[DONE]" in answer.split("\r\n\r\n", 1)[1]
    lazy.close()
    wait_until(served, "gptlite_writing", 0)


def test_a_full_house_says_so_at_once(served: Served) -> None:
    busy = [served.send("/v1/completions", LONG) for _ in range(4)]
    wait_until(served, "gptlite_waiting", 2)
    connection = served.send("/v1/completions", LONG)
    answer = connection.recv(1 << 16).decode()
    assert answer.startswith("HTTP/1.1 429 ")
    assert "retry-after: 1" in answer
    for each in (*busy, connection):
        each.close()
    wait_until(served, "gptlite_writing", 0)


def test_a_thousand_idle_connections_are_let_be_and_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.allow_many_sockets()
    idle = [served.connect() for _ in range(1000)]
    assert json.loads(served.get("/health"))["status"] == "ok"
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET  HTTP/9\r\n\r\n",
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["two hosts", "no version", "tls", "a long header", "no chunk"],
)
def test_what_is_no_request_is_refused(served: Served, sent: bytes) -> None:
    connection = served.connect()
    connection.sendall(sent)
    assert connection.recv(1 << 16).decode().startswith("HTTP/1.1 4")
    connection.close()
    assert json.loads(served.get("/health"))["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_has_begun_end(tiny: Path, number: int) -> None:
    with serving_process(str(tiny), folder=tiny.parent) as served:
        asked = {"prompt": "The", "max_tokens": 3000, "stream": True}
        connection = served.send("/v1/completions", asked)
        connection.recv(100)
        served.process.send_signal(number)
        text = read_all(connection)
        assert text.count('"finish_reason": "length"') == 1
        assert "[DONE]" in text
        assert served.process.wait(30) == 128 + number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could ask; give a --token as well\n"),
        (["--token", "a\nb"], "--token: give printable ASCII characters\n"),
        (["nowhere"], "nowhere: no such directory\n"),
        (["--checkpoint", "step-99"], "step-99"),
    ],
)
def test_a_mistake_is_one_line(tiny: Path, arguments: list[str], message: str) -> None:
    runs = [] if "nowhere" in arguments else [str(tiny)]
    result = CliRunner().invoke(app, ["serve", *runs, *arguments])
    assert result.exit_code in (2, 3)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_named(served: Served, tiny: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tiny), "--port", str(served.port)])
    assert result.exit_code == 2
    expected = f"--port {served.port}: cannot listen at 127.0.0.1 (address already in use)\n"
    assert result.stderr == expected


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "load_trained", None)  # not called
    monkeypatch.setattr(server, "usable_memory_bytes", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"need 0.0 GiB to serve, and 0.0 may be used here"):
        server.load_models({"tiny": tiny}, "best", 32, print)


def test_as_many_rows_as_fit_are_served(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = server.load_run([str(tiny / "config.yaml")], to_train=False)
    weights = 4 * run.model.n_parameters(server.load_tokenizer(tiny).vocab_size)
    memory = (weights + 3 * server.cache_bytes(run)) / server.SHARE_OF_MEMORY + 100
    monkeypatch.setattr(server, "usable_memory_bytes", lambda: int(memory))
    said: list[str] = []
    (model,) = server.load_models({"tiny": tiny}, "best", 32, said.append)
    assert model.most_rows == 3
    assert said == ["--batch 32: 3 completions at once are what fits into memory"]
    bytes_of_a_row = sum(each[:1].nbytes for each in model.batch.caches[0].keys) * 2
    assert bytes_of_a_row == server.cache_bytes(run)


def test_two_runs_of_one_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the same name; rename one of them"):
        server.name_models([tiny, tmp_path / tiny.name])


def test_without_a_run_it_serves_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not RUNS.exists()
    with serving_process(folder=tmp_path) as served:
        assert "<title>" in served.get("/")
        assert json.loads(served.get("/api/models")) == {"models": [], "demo": True}

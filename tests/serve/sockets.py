"""`gptlite serve` as a process of its own, for what only sockets and signals can show."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Served(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return connection

    def send(self, path: str, asked: Any) -> socket.socket:
        """A connection on which this has been asked; it is closed after the answer."""
        body = json.dumps(asked).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = self.connect()
        connection.sendall(head.encode() + body)
        return connection

    def get(self, path: str) -> str:
        """The body of an answer."""
        connection = self.connect()
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        return read_all(connection).partition("\r\n\r\n")[2]

    def gauge(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.M)
        assert found is not None
        return float(found[1])


def read_all(connection: socket.socket) -> str:
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


@contextmanager
def serving_process(*arguments: str, folder: Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "gptlite", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r":(\d+)/", said)
        assert found is not None, said + (process.stderr.read() if process.stderr else "")
        yield Served(process, int(found[1]))
    finally:
        process.kill()
        _, complaints = process.communicate()
    assert "Traceback" not in complaints, complaints

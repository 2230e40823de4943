"""That ranks live, and why one left: through torch's key-value store, beside all other traffic.

Every rank counts up `beat/RANK`. The first rank watches all, the others watch the first. A rank
that fails says so under `failed`; one that stands still is named by who watches it. Whoever reads
`failed` leaves with the exit code that stands there, whatever it was waiting for.

Ours because the time-outs of torchrun and of process groups cannot name the rank that is gone.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from gptlite.terminal import tell_problem

INTERVAL = 0.5
"""Seconds between beats."""
GRACE = 2.0
"""Seconds for a rank to fail by itself, as the others did, before it is made to leave."""
FAREWELL = 5.0
"""Seconds that a rank that leaves waits for the others, who leave too."""


class Process(NamedTuple):
    """Which process a rank is."""

    pid: int
    host: str
    pids: str
    """Names the system's list of processes that the pid is from; empty: not known."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def own(cls) -> "Process":
        try:
            pids = os.readlink("/proc/self/ns/pid")
        except OSError:
            pids = ""
        return cls(os.getpid(), socket.gethostname(), pids)

    def is_gone(self) -> bool:
        """Whether it has ended, as far as this process can see it."""
        here = Process.own()
        if not self.pids or (self.host, self.pids) != (here.host, here.pids):
            return False
        return not os.path.exists(f"/proc/{self.pid}")


class Failure(NamedTuple):
    """Why a rank left; the exit code is that of all."""

    rank: int
    exit_code: int
    problems: list[str]

    def lines(self) -> list[str]:
        return [f"rank {self.rank}: {problem}" for problem in self.problems]


class Heartbeat(threading.Thread):
    """Beats, and watches others, until it is stopped."""

    def __init__(self, store: Store, rank: int, processes: list[Process]) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.rank = rank
        self.processes = processes
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # stubs lack it
        self.timeout_seconds = 60.0
        self.leaving = threading.Event()
        self.watched = [0] if rank else list(range(1, len(processes)))
        now = time.monotonic()
        self.seen = {other: (b"", now) for other in self.watched}

    def run(self) -> None:
        beats = 0
        try:
            while not self.leaving.wait(INTERVAL):
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))
                if self.store.check(["failed"]):
                    self.follow(self.read_failure())
                for failure in (self.find_killed(), self.find_silent()):
                    if failure is not None:
                        self.follow(self.report(failure))
        except dist.DistError:
            lost = Failure(self.rank, 1, ["lost contact with the rendezvous: its process is gone"])
            self.follow(lost)

    def find_killed(self) -> Failure | None:
        """A watched rank of this machine that was killed, and so could not say anything."""
        for other in self.watched:
            process = self.processes[other]
            if process.is_gone() and not self.store.check([f"left/{other}"]):
                return Failure(other, 1, [f"{process} was killed"])
        return None

    def find_silent(self) -> Failure | None:
        """A watched rank that has not answered for too long."""
        now = time.monotonic()
        for other in self.watched:
            at = f"beat/{other}"
            count = self.store.get(at) if self.store.check([at]) else b""
            before, since = self.seen[other]
            if count != before:
                self.seen[other] = (count, now)
            elif now - since > self.timeout_seconds:
                seconds = f"{self.timeout_seconds:g} seconds"
                why = f"{self.processes[other]} has not answered for {seconds}"
                return Failure(other, 1, [why])
        return None

    def report(self, failure: Failure) -> Failure:
        """Say why a rank leaves; of several, the one that was first counts."""
        self.store.compare_set("failed", "", json.dumps(failure))
        return self.read_failure()

    def read_failure(self) -> Failure:
        return Failure(*json.loads(self.store.get("failed")))

    def follow(self, failure: Failure) -> None:
        """Leave as another rank did, from wherever this one is."""
        if self.leaving.wait(GRACE):  # it has noticed by itself
            return
        if self.rank == 0:
            for line in failure.lines():
                tell_problem(line)
            sys.stderr.flush()
        with suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "1")
        os._exit(failure.exit_code)

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Why another rank left, if it says so within that time."""
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                if self.store.check(["failed"]):
                    return self.read_failure()
                time.sleep(0.1)
        except dist.DistError:
            pass
        return None

    def stop(self, farewell: float) -> None:
        """End the thread, and wait so many seconds for the others to be as far.

        The first rank may hold the store; and who leaves early has torchrun end the others.
        """
        self.leaving.set()
        self.join(FAREWELL)
        until = time.monotonic() + farewell
        try:
            self.store.set(f"left/{self.rank}", "1")
            others = [f"left/{other}" for other in self.watched]
            while not self.store.check(others) and time.monotonic() < until:
                time.sleep(0.05)
        except dist.DistError:  # the store went before
            pass

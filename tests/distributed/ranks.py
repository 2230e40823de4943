"""Several ranks in processes forked from the test's own, which has torch loaded already."""

import json
import multiprocessing
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptlite.core.world import World
from gptlite.distributed.torchrun import join_ranks
from gptlite.terminal import user_errors

NOISE = re.compile(
    r"^(\[.*\bc10d\b|Exception raised from|frame #|<omitting python).*\n+", re.MULTILINE
)
"""Of torch's C++ side; the command silences it before torch is loaded, which it is here already."""
PROCESSES = multiprocessing.get_context("fork")


class Ended(NamedTuple):
    """How a rank ended."""

    exit_code: int
    said: str
    """On stderr."""
    result: Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def begun(size: int, work: Callable[[World], Any], folder: Path, **environment: str) -> list[Any]:
    """So many processes, begun; `ended` waits for them."""
    folder.mkdir(exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | environment
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        process = PROCESSES.Process(target=as_rank, args=(work, folder, shared | own), daemon=True)
        process.start()
        processes.append(process)
    return processes


def as_rank(work: Callable[[World], Any], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    torch.set_num_threads(1)
    said = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for the whole process
    code = 0
    try:
        with user_errors(), join_ranks() as world:
            (folder / f"{rank}.json").write_text(json.dumps(work(world)))
    except BaseException as error:  # noqa: BLE001 - the exit code is what is looked at
        code = getattr(error, "exit_code", getattr(error, "code", None))
        if code is None:
            traceback.print_exc()
            code = 1
    sys.stderr.flush()
    os._exit(code)


def ended(processes: list[Any], folder: Path, seconds: float = 60) -> list[Ended]:
    """Of all ranks, in their order."""
    found = []
    for rank, process in enumerate(processes):
        process.join(seconds)
        if process.exitcode is None:
            for each in processes:
                each.kill()
            raise AssertionError(f"rank {rank} goes on")
        path = folder / f"{rank}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        said = NOISE.sub("", (folder / f"{rank}.err").read_text())
        found.append(Ended(process.exitcode, said, result))
    return found


def together(size: int, work: Callable[[World], Any], folder: Path) -> list[Any]:
    """What each rank's `work` returns."""
    found = ended(begun(size, work, folder), folder)
    assert [rank.exit_code for rank in found] == [0] * size, found
    return [rank.result for rank in found]

"""Several processes as torchrun starts them: who they are, what they say, DDP and FSDP2.

Nothing here is of our own making but the words: torch's store, process groups, DDP and fully_shard.
Batches and masks are functions of global numbers, so ranks only add up gradients and losses.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gptlite import __version__
from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.core.world import Engine, World
from gptlite.distributed.heartbeat import FAREWELL, Failure, Heartbeat, Process
from gptlite.errors import ConfigError, UserError
from gptlite.terminal import describe_exit

CONNECT_SECONDS, JOIN_SECONDS = 5, 10
"""To reach the store (torch tries twice as long), and for all ranks to have come there."""
COLLECTIVE_MINUTES = 60
"""Longest wait of a rank for the others, as when the first saves; the dead are noticed before."""
TOLD_SECONDS = 4.0
"""How long a rank that lost another waits to be told why."""
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
T = TypeVar("T")


class Ddp(Engine):
    """The whole model in every process; gradients are summed while the backward pass goes on."""

    def __init__(self, model: GPT, ranks: "Ranks") -> None:
        super().__init__(model)
        self.scale = float(ranks.size)  # DDP divides by it
        self.module = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        out: Tensor = self.module(*inputs, **named)
        return out

    def sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()


class Fsdp(Engine):
    """Each process holds its part of every weight, gradient and moment; blocks come and go."""

    def __init__(self, model: GPT, ranks: "Ranks") -> None:
        super().__init__(model)
        mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other

    @contextmanager
    def sync_gradients(self, last: bool) -> Iterator[None]:
        for part in self.parts:
            part.set_requires_gradient_sync(last, recurse=False)
        yield

    @contextmanager
    def gather_weights(self) -> Iterator[None]:
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self.parts:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()


ENGINES: dict[str, Callable[[GPT, "Ranks"], Engine]] = {"ddp": Ddp, "fsdp": Fsdp}


class Ranks(World):
    """This process among others."""

    def __init__(self, store: Store) -> None:
        super().__init__(int(os.environ["WORLD_SIZE"]))
        self.rank = int(os.environ["RANK"])
        self.store = store
        self.round = 0
        self.turn = int(os.environ.get("LOCAL_RANK", "0"))
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.wait_for_all(JOIN_SECONDS)
        versions = f"torch {torch.__version__}, gptlite {__version__}"
        processes, have = zip(*self.gather([Process.own(), versions]), strict=True)
        for other, theirs in enumerate(have):
            if theirs != have[0]:
                raise ConfigError(f"rank {other} has {theirs}, rank 0 has {have[0]}")
        self.heartbeat = Heartbeat(store, self.rank, [Process(*each) for each in processes])
        self.heartbeat.start()
        self.farewell = FAREWELL
        """Seconds to wait for the others at the end."""
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(minutes=COLLECTIVE_MINUTES),
        )

    def set_timeout(self, seconds: float) -> None:
        self.heartbeat.timeout_seconds = seconds

    def wait_for_all(self, seconds: float) -> None:
        """Raises ConfigError naming the ranks that did not come."""
        self.store.set(f"here/{self.rank}", "1")
        until = time.monotonic() + seconds
        while missing := [r for r in range(self.size) if not self.store.check([f"here/{r}"])]:
            if time.monotonic() > until:
                names = ", ".join(map(str, missing))
                raise ConfigError(
                    f"rank {names} of {self.size} did not come in {seconds:g} seconds"
                )
            time.sleep(0.05)

    def broadcast(self, make: Callable[[], T]) -> T:
        found: T = self.gather(make() if self.first else None)[0]
        return found

    def gather(self, value: Any) -> list[Any]:
        self.round += 1
        at = f"{self.round}/"
        self.store.set(at + str(self.rank), json.dumps(value))
        values = [json.loads(self.wait_for(at + str(other))) for other in range(self.size)]
        if self.round > 1:  # all have read that one
            self.store.delete_key(f"{self.round - 1}/{self.rank}")
        return values

    def wait_for(self, key: str) -> bytes:
        """A value that another rank will set; signals are seen while it is waited for."""
        while True:
            try:
                self.store.wait([key], timedelta(seconds=1))
                return self.store.get(key)
            except dist.DistStoreError as error:
                if "wait timeout" not in str(error):
                    raise

    def largest(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def make_in_turn(self, make: Callable[[], T]) -> T:
        made = [make()] if self.turn == 0 else []
        self.gather(None)
        return made[0] if made else make()

    def device(self, run: RunConfig) -> torch.device:
        if run.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(run.device)

    def engine(self, run: RunConfig, model: GPT) -> Engine:
        return ENGINES[run.distributed.engine](model, self)

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def copy_into(self, target: Tensor, source: Tensor | None) -> None:
        inside = target.data if isinstance(target, nn.Parameter) else target
        here = torch.empty(target.shape, dtype=target.dtype) if source is None else source
        here = here.to(target.device)
        if isinstance(inside, DTensor):
            inside.copy_(distribute_tensor(here, inside.device_mesh, inside.placements))
        else:
            inside.copy_(here)
            dist.broadcast(inside, 0)

    def leave(self, error: BaseException) -> BaseException:
        """What this process ends with, after all others know of it."""
        code, problems = describe_exit(error)
        failure = Failure(self.rank, code, problems)
        if is_lost_contact(error):
            self.farewell = 0.0
            told = self.heartbeat.wait_for_failure(TOLD_SECONDS)
            failure = told or Failure(self.rank, 1, [f"lost contact with another rank: {error}"])
            error = UserError(*failure.lines())
            error.exit_code = failure.exit_code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when the first one is gone
        try:
            self.heartbeat.leaving.set()
            self.heartbeat.report(failure)
        except dist.DistError:  # the store went first
            pass
        return error if self.first else SystemExit(failure.exit_code)


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: gloo has no type of error for it."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")
    gone = isinstance(error, RuntimeError) and any(word in text for word in words)
    return isinstance(error, dist.DistError) or gone


def rendezvous() -> Store:
    """The store that all ranks share. Raises ConfigError if they do not find each other."""
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise ConfigError(
            f"{', '.join(missing)}: not set, though WORLD_SIZE is {os.environ['WORLD_SIZE']}; "
            "start with torchrun, which sets them"
        )
    host, port, rank, size = (os.environ[name] for name in VARIABLES)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store
    found: Future[TCPStore] = Future()

    def connect() -> None:
        try:
            store = TCPStore(
                host,
                int(port),
                int(size),
                is_master=rank == "0" and not agent,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
            )
            found.set_result(store)
        except (dist.DistError, RuntimeError, ValueError) as error:
            found.set_exception(error)

    # Another program that listens there can keep torch waiting for its answer for ever.
    threading.Thread(target=connect, daemon=True).start()
    try:
        store = found.result(JOIN_SECONDS)
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as error:
        why = str(error).strip().partition("\n")[0][:200] or "no answer of a store of torch's"
        why = "the port is in use by another program" if "EADDRINUSE" in why else why
        raise ConfigError(f"rendezvous of {size} ranks at {host}:{port} failed: {why}") from None
    return PrefixStore(f"gptlite/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def join() -> Iterator[Ranks]:
    """This process among the others; what fails in one ends all, with one exit code.

    Only the first rank's errors leave here as they are: it speaks for all.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    ranks = Ranks(rendezvous())
    try:
        yield ranks
        ranks.gather(None)
    except BaseException as error:
        raise ranks.leave(error) from None
    finally:
        ranks.heartbeat.stop(ranks.farewell)
    dist.destroy_process_group()

"""Whether torchrun has started this process as one of several; torch is loaded only if so."""

import os
from contextlib import AbstractContextManager, nullcontext

from gptlite.core.world import ALONE, World
from gptlite.errors import ConfigError


def n_ranks() -> int:
    """How many processes were started to work together."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE: expected a number from 1 on (got {text!r})")
    return int(text)


def join_ranks() -> AbstractContextManager[World]:
    """This process among the others that torchrun has started, if it has."""
    if n_ranks() == 1:
        return nullcontext(ALONE)
    # Its C++ side fills the screen where another rank is gone, which is said in one line of ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from gptlite.distributed.ranks import join

    return join()


def refuse_ranks(command: str) -> None:
    """Raises ConfigError where a command for one process is started as several."""
    if n_ranks() > 1:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(ConfigError.exit_code)
        raise ConfigError(f"{command}: works in one process; start it without torchrun")

"""What a user can be told: every failure they can act on, with the exit code a script sees.

0 done | 1 failure | 2 usage or config | 3 no usable checkpoint | 4 diverged | 5 storage |
6 run directory in use | 128 + n stopped by signal n (130 SIGINT, 143 SIGTERM), checkpoint saved
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend; each problem is one line that names the place and the fix."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(UserError):
    """A config, an option or a prompt that cannot be meant."""

    exit_code = 2


def install_command(*packages: str) -> str:
    """What installs them, by their own names: `gptlite` on PyPI is another project's."""
    return f"pip install {' '.join(map(shlex.quote, packages))}"


class MissingPackages(ConfigError):
    """What an extra brings is not installed."""

    def __init__(self, place: str, *packages: str) -> None:
        lacks, install = " and ".join(packages), install_command(*packages)
        super().__init__(f"{place} needs {lacks}: {install}")


class DataError(UserError):
    """Text or token files that are missing, damaged or too small for what is asked."""

    exit_code = 2


class CheckpointError(UserError):
    """No checkpoint that can be trusted."""

    exit_code = 3


class DivergedError(UserError):
    """A loss or gradient that is not finite; it never reaches the weights."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full, read-only, gone or failing."""

    exit_code = 5


class RunInUseError(UserError):
    """Another process trains in this run directory."""

    exit_code = 6


class Stopped(UserError):
    """A signal asked to leave; the checkpoint is saved."""

    def __init__(self, signal_number: int, *problems: str) -> None:
        super().__init__(*problems)
        self.exit_code = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing has to be saved: what is half written is removed on the way out."""


@contextmanager
def add_step_to_errors(step: int) -> Iterator[None]:
    """Says of what is not finite at which step of a run it was."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"step {step}: {error}") from None

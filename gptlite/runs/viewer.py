"""Who follows a run while it trains: how much they are told, and the page that is made for them."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptlite.config.promise import Promise
from gptlite.planning.budget import MOST_FOR_PAGES
from gptlite.runs.look import add_look

FIRST_PAGE = 0.2
"""Seconds that the first page is expected to take; of the next ones it is known."""

AddReport = Callable[[Path, Callable[[str], None]], None]
"""Makes the page of a run directory and says so, or why there is none."""


class Viewer(NamedTuple):
    verbose: bool = False
    """Whether the reasons of every choice are shown; train.log has them in any case."""
    foresees: bool = False
    """Whether the time that the run will take is estimated before."""
    seconds: float | None = None
    """That estimate, where it is known already."""
    promise: Promise | None = None
    """What the docs say that it takes."""
    add_report: AddReport | None = None


NOBODY = Viewer()


def next_lines(directory: Path) -> list[str]:
    """What one may do with a run that is done."""
    name = shlex.quote(str(directory))
    commands = f"generate --run {name} --interactive", f"eval --run {name}", f"serve {name}"
    return [f"next: gptlite {command}" for command in commands]


class Pages:
    """The page of a run: made again at evaluations, and at the end with everything on it.

    While a run trains, pages take at most a share of MOST_FOR_PAGES of its time.
    """

    def __init__(
        self,
        add_report: AddReport | None,
        directory: Path,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.add_report, self.directory, self.say, self.clock = add_report, directory, say, clock
        self.spent, self.last = 0.0, 0.0

    def refresh(self, passed: float, foreseen: float) -> None:
        """Make the page if there is time for it, of what has passed or, for the first one, of what
        the whole run is expected to take."""
        if self.add_report is None or not self.is_affordable(passed, foreseen):
            return
        began = self.clock()
        said: list[str] = []
        self.add_report(self.directory, said.append)
        self.last = self.clock() - began
        self.spent += self.last
        if failed := [line for line in said if line.startswith("no report")]:
            self.say(failed[0])
            self.add_report = None  # another try would not do better

    def is_affordable(self, passed: float, foreseen: float) -> bool:
        if self.spent:
            return self.spent + self.last <= MOST_FOR_PAGES * passed
        return MOST_FOR_PAGES * max(passed, foreseen) >= FIRST_PAGE

    def finish(self) -> None:
        if self.add_report is not None:
            add_look(self.directory)
            self.add_report(self.directory, self.say)

"""Signals: a run that is told to stop saves and leaves; whoever asks twice is obeyed at once."""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager

from gptlite.core.world import ALONE, World
from gptlite.errors import Terminated

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
"""Ctrl-C; how systems and schedulers ask to end, and warn before they end it; a terminal closed."""


class Interrupted(BaseException):
    """What was begun is given up, because a signal came; nothing was changed by it."""


class Interrupts:
    """Notes the first signal for the loop to act on between updates; the second one leaves.

    Of several ranks none acts on a signal by itself: all `poll` at the same moments.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.received = 0
        self.immediate = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.received:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.received = number
        if self.immediate:
            self.immediate = False
            raise Interrupted

    @contextmanager
    def raise_at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once: evaluating and sampling change nothing."""
        if self.received and self.world.size == 1:
            raise Interrupted
        self.immediate = self.world.size == 1
        try:
            yield
        finally:
            self.immediate = False

    def poll(self) -> None:
        """Raises Interrupted if a signal has come to any rank."""
        agreed = self.world.largest(self.received)
        if agreed:  # else what is noted stays: a signal may have come while ranks agreed
            self.received = agreed
            raise Interrupted

    @contextmanager
    def catch_signals(self) -> Iterator["Interrupts"]:
        """Inside, this handles SIGNALS; afterwards, who handled them before."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        # What the caller ignores, as nohup does, stays ignored.
        wanted = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        try:
            for number in wanted:
                signal.signal(number, self)
        except ValueError:  # not the main thread: the caller owns the signals
            wanted = []
        try:
            yield self
        finally:
            for number in wanted:
                signal.signal(number, before[number])

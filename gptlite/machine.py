"""What this process may use of its machine: cores and memory, within its container. No torch.

Not psutil: it does not know the limits of a container.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
"""Where /proc and /sys are; tests put a machine of their own here."""
SPIN_ALONE, SPIN_BESIDE = 3000, 300
"""Turns that a thread of libgomp waits busily for work before it sleeps: where it has the cores to
itself, and where other programs want them.

Its default of 300,000 is longer than a time slice: two threads then wait for each other for whole
slices. Fewer turns cost nothing down to 3000 and a fifth at 300 (docs/benchmarks.md).
"""
LOOKS, SECONDS_BETWEEN_LOOKS = 4, 0.002
"""At how many threads want to run; who is there at each look stays."""
BLOCK_TIME = "1"
"""The same for libomp and Intel's OpenMP, in milliseconds (default 200)."""


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in cpu_quotas())]))


def usable_memory_bytes() -> int:
    """Memory that this process may use: that of the machine, or the limit of its container."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        physical = 1 << 40
    return min([physical, *memory_limits()])


def cpu_quotas() -> Iterator[float]:
    """Processors' worth of time that each cgroup around this process allows."""
    for folder in cgroups("cpu"):
        both = read_system_file(folder / "cpu.max").split()  # version 2
        if not both:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            both = [word for name in names for word in read_system_file(folder / name).split()]
        if len(both) == 2 and all(word.isdecimal() and int(word) for word in both):
            yield int(both[0]) / int(both[1])


def memory_limits() -> Iterator[int]:
    """Bytes that each cgroup around this process allows; without a limit there is no number."""
    for folder in cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            for word in read_system_file(folder / name).split():
                if word.isdecimal() and int(word):
                    yield int(word)


def cgroups(controller: str) -> Iterator[Path]:
    """Folders of the control groups around this process, versions 1 and 2 (man 7 cgroups)."""
    mounted = ROOT / "sys/fs/cgroup"
    for line in read_system_file(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        # In a container the path may be the host's, while its own group is mounted as the root.
        names = (controllers, controller) if controllers else ("",)
        for top in {mounted / name for name in names}:
            inner = top / path.lstrip("/")
            yield from (inner, *(outer for outer in inner.parents if outer.is_relative_to(top)))


def read_system_file(path: Path) -> str:
    """What the system says of itself there; nothing where there is no such file."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def let_waiting_threads_sleep() -> None:
    """Call before torch loads its OpenMP. What the user has set in the environment wins."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_BESIDE if is_busy() else SPIN_ALONE)
    os.environ.setdefault("KMP_BLOCKTIME", BLOCK_TIME)


def is_busy() -> bool:
    """Whether other programs want the cores now that our threads would take."""
    spare = (os.cpu_count() or 1) - count_cores()
    for look in range(LOOKS):
        if look:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        running = re.match(r"\S+ \S+ \S+ (\d+)/", read_system_file(ROOT / "proc/loadavg"))
        if running is None or int(running[1]) - 1 <= spare:  # without us
            return False
    return True

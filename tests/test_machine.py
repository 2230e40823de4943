"""Cores and memory of machines and containers that are made up, and what the commands take."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, Bench, Workshop, merged

from gptlite import machine
from gptlite.cli import main
from gptlite.data import workers
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained
from gptlite.studies import study

GIB = 1 << 30
NO_LIMIT = "9223372036854771712"
"""How version 1 writes that memory has no limit."""
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.fixture(autouse=True)
def _eight_cores_and_16_gib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))


def v1(quota: object, period: object = 100_000, at: str = V1) -> dict[str, str]:
    """The two files in which version 1 has a quota."""
    return {f"{at}/cpu.cfs_quota_us": f"{quota}\n", f"{at}/cpu.cfs_period_us": f"{period}\n"}


QUOTAS: dict[str, tuple[dict[str, str], int]] = {
    "none at all": ({}, 8),
    "v2 own": ({"proc/self/cgroup": "0::/job\n", f"{V2}/job/cpu.max": "300000 100000\n"}, 3),
    "v2 outer": (
        {
            "proc/self/cgroup": "0::/pod/job\n",
            f"{V2}/pod/cpu.max": "200000 100000\n",
            f"{V2}/pod/job/cpu.max": "max 100000\n",
        },
        2,
    ),
    "v2 the least of several": (
        {
            "proc/self/cgroup": "0::/pod/job\n",
            f"{V2}/pod/cpu.max": "500000 100000\n",
            f"{V2}/pod/job/cpu.max": "100000 25000\n",
        },
        4,
    ),
    "v2 max": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, 8),
    "v2 in a container": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000\n"}, 2),
    "v2 with the path of the host": (
        {
            "proc/self/cgroup": "0::/system.slice/docker-01.scope\n",
            f"{V2}/cpu.max": "200000 100000",
        },
        2,
    ),
    "v2 outside of the mounted groups": (
        {"proc/self/cgroup": "0::/../../other\n", f"{V2}/cpu.max": "200000 100000"},
        2,
    ),
    "v2 of another group": ({"proc/self/cgroup": "0::/job\n", f"{V2}/x/cpu.max": "1000 1000"}, 8),
    "less than one core": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "50000 100000\n"}, 1),
    "more than there are": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "64000 1000\n"}, 8),
    "v1 none": ({"proc/self/cgroup": "4:cpu:/job\n", **v1(-1, at=f"{V1}/job")}, 8),
    "v1 own": ({"proc/self/cgroup": "4:cpu:/job\n", **v1(150_000, at=f"{V1}/job")}, 1),
    "v1 outer": (
        {"proc/self/cgroup": "4:cpu:/pod/job\n", **v1(300_000, at=f"{V1}/pod"), **v1(-1)},
        3,
    ),
    "v1 combined": (
        {
            "proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/job\n0::/job\n",
            **v1(600_000, at=f"{V2}/cpu,cpuacct/job"),
        },
        6,
    ),
    "v1 combined, by its link": ({"proc/self/cgroup": "3:cpuacct,cpu:/\n", **v1(600_000)}, 6),
    "v1 with the path of the host": (
        {"proc/self/cgroup": "4:cpu:/docker/0123\n", **v1(200_000)},
        2,
    ),
    "v1 of another controller": ({"proc/self/cgroup": "4:cpuset:/\n", **v1(200_000)}, 8),
    "v1 without its period": (
        {"proc/self/cgroup": "4:cpu:/\n", f"{V1}/cpu.cfs_quota_us": "200000\n"},
        8,
    ),
    "a period of 0": ({"proc/self/cgroup": "4:cpu:/\n", **v1(200_000, 0)}, 8),
    "a quota of 0": ({"proc/self/cgroup": "4:cpu:/\n", **v1(0)}, 8),
    "garbage": ({"proc/self/cgroup": "\n:\nwhat?\n0::\n", f"{V2}/cpu.max": "\xff\xfe"}, 8),
    "words": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "two of three\n"}, 8),
    "numbers of another kind": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "-2 1e5\n"}, 8),
}


@pytest.mark.parametrize(("files", "cores"), QUOTAS.values(), ids=QUOTAS)
def test_cores_are_those_that_the_container_may_use(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    lay_out(tmp_path, files)
    assert machine.count_cores() == cores


def test_cores_are_those_that_this_process_is_bound_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "400000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert machine.count_cores() == 1


@pytest.mark.parametrize(("there", "counted"), [(6, 6), (None, 1)])
def test_without_bindings_all_cores_count(
    monkeypatch: pytest.MonkeyPatch, there: int | None, counted: int
) -> None:
    """macOS has none; what is not known is one core."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    assert machine.count_cores() == counted


MEMORY = f"{V2}/memory"
LIMITS: dict[str, tuple[dict[str, str], int]] = {
    "none at all": ({}, 16),
    "v2 own": ({"proc/self/cgroup": "0::/job\n", f"{V2}/job/memory.max": f"{3 * GIB}\n"}, 3),
    "v2 outer": (
        {
            "proc/self/cgroup": "0::/pod/job\n",
            f"{V2}/pod/memory.max": f"{2 * GIB}\n",
            f"{V2}/pod/job/memory.max": "max\n",
        },
        2,
    ),
    "v2 max": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n"}, 16),
    "v1 none": (
        {"proc/self/cgroup": "4:memory:/\n", f"{MEMORY}/memory.limit_in_bytes": NO_LIMIT},
        16,
    ),
    "v1 own": (
        {
            "proc/self/cgroup": "4:memory:/job\n",
            f"{MEMORY}/memory.limit_in_bytes": NO_LIMIT,
            f"{MEMORY}/job/memory.limit_in_bytes": f"{5 * GIB}\n",
        },
        5,
    ),
    "v1 with the path of the host": (
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n",
            f"{MEMORY}/memory.limit_in_bytes": f"{5 * GIB}\n",
        },
        5,
    ),
    "more than there is": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{99 * GIB}"}, 16),
    "garbage": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "\xff all of it -1 0 1.5"}, 16),
}


@pytest.mark.parametrize(("files", "gib"), LIMITS.values(), ids=LIMITS)
def test_memory_is_what_the_container_may_use(
    tmp_path: Path, files: dict[str, str], gib: int
) -> None:
    lay_out(tmp_path, files)
    assert machine.usable_memory_bytes() == gib * GIB


def test_where_memory_cannot_be_asked_for_a_limit_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert machine.usable_memory_bytes() > 100 * GIB
    lay_out(tmp_path, {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": str(GIB)})
    assert machine.usable_memory_bytes() == GIB


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
        ({"GOMP_SPINCOUNT": "infinity"}, {"KMP_BLOCKTIME": "1"}),
        ({"KMP_BLOCKTIME": "0"}, {"GOMP_SPINCOUNT": "3000"}),
    ],
)
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], added: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", **given})
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    machine.let_waiting_threads_sleep()
    assert os.environ == {"HOME": "/", **given, **added}


WATCH_TORCH = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
            os._exit(7)
sys.meta_path.insert(0, Watch())
sys.argv = ["gptlite", "plan", "--config", "debug"]
runpy.run_module("gptlite", run_name="__main__")
"""


def test_a_command_says_so_before_torch_is_imported() -> None:
    """OpenMP reads it once, when torch loads it."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-u", "-c", WATCH_TORCH]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout in ("3000 1\n", "300 1\n")


@pytest.mark.parametrize(
    ("cores", "usable", "running", "busy"),
    [
        (2, 2, [1, 1, 1, 1], False),
        (2, 2, [3, 3, 3, 3], True),
        (2, 2, [3, 3, 1, 3], False),  # it came and went
        (8, 8, [2, 2, 2, 2], True),
        (8, 2, [5, 5, 5, 5], False),  # others have cores that we may not use
        (8, 2, [8, 8, 8, 8], True),
        (2, 2, [], False),
    ],
)
def test_a_machine_is_busy_where_others_want_our_cores(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cores: int,
    usable: int,
    running: list[int],
    busy: bool,
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(machine, "count_cores", lambda: usable)
    (tmp_path / "proc").mkdir()
    looks = iter(running)

    def look(_: float = 0) -> None:
        if running:
            (tmp_path / "proc/loadavg").write_text(f"0.50 0.40 0.30 {next(looks)}/321 4567\n")

    look()
    monkeypatch.setattr(machine.time, "sleep", look)
    assert machine.is_busy() == busy
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(machine, "is_busy", lambda: busy)
    machine.let_waiting_threads_sleep()
    assert os.environ["GOMP_SPINCOUNT"] == ("300" if busy else "3000")


def test_windows_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("platform.system", lambda: "Windows")
    for name in ("leave_when_terminated", "let_waiting_threads_sleep", "app"):
        monkeypatch.setattr(main, name, fail)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "gptlite: Windows is not supported; use WSL: wsl --install\n")


ON_WINDOWS = """
import platform, sys
lacking = "fcntl resource termios tty pty pwd grp readline"
sys.modules |= dict.fromkeys(lacking.split())
platform.system = lambda: "Windows"
from gptlite.cli.main import main
main()
"""


def test_windows_is_told_although_it_lacks_modules() -> None:
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


COUNT_THREADS = """
import json, os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import torch
from gptlite.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    torch.set_num_threads(3)  # whatever it would take by itself
    sys.argv = ["gptlite", *arguments]
    try:
        main()
    except SystemExit as left:
        assert not left.code, left.code
    found.append(torch.get_num_threads())
print("threads:", *found)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no bindings on this system")
def test_every_command_works_in_as_many_threads_as_there_are_cores(workshop: Workshop) -> None:
    """Bound to one core, though the run was trained in two threads."""
    data = {"source": str(workshop.text), "cache_dir": str(workshop.folder / "cache")}
    values = merged(TINY, {"data": data, "train": {"threads": "auto"}})
    config, run = workshop.folder / "config.yaml", workshop.folder / "run"
    config.write_text(yaml.safe_dump(values))
    given = ["--config", str(config)]
    trains = [["plan", *given], ["train", *given, "--out-dir", str(run), "--verbose"]]
    elsewhere = workshop.folder / "elsewhere"
    train(workshop.run(train={"threads": 2}), elsewhere)
    uses = [
        ["eval", "--run", str(elsewhere)],
        ["generate", "--run", str(elsewhere), "--max-new-tokens", "2"],
        ["export", "--run", str(elsewhere), "--out", str(workshop.folder / "exported")],
        ["import", str(workshop.folder / "exported"), "--out", str(workshop.folder / "imported")],
    ]
    command = [sys.executable, "-c", COUNT_THREADS, json.dumps([*trains, *uses])]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1:]
    assert last == ["threads: 1 1 1 1 1 1"], done.stderr
    assert "auto: train.threads = 1: the cores that this process may use" in done.stderr
    assert json.loads((run / "env.json").read_text())["cpu_threads"] == 1


@pytest.mark.parametrize(("cores", "threads"), [(8, 3), (3, 3), (2, 2)])
def test_a_run_is_used_in_its_own_number_of_threads_where_there_are_as_many(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    train(workshop.run(train={"max_steps": 4, "threads": 3}), workshop.folder / "run")
    assert torch.get_num_threads() == 3  # as it was asked for, on any machine
    monkeypatch.setattr(machine, "count_cores", lambda: cores)
    load_trained(workshop.folder / "run", "best")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (8, 3)])
def test_three_texts_are_read_by_as_many_processes_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int
) -> None:
    started = []

    def counted(do: workers.DoJob, worker: type[workers.Worker] = workers.Worker) -> workers.Worker:
        started.append(worker(do))
        return started[-1]

    monkeypatch.setattr(workers, "Worker", counted)
    monkeypatch.setattr(machine, "count_cores", lambda: cores)
    found = workers.run_jobs(operator.is_, [1, 2, 3], [Path()] * 3, lambda *_: None)
    assert (found, len(started)) == ([False] * 3, processes)


@pytest.mark.parametrize(("n_workers", "threads"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_the_workers_of_a_study_share_the_cores(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, n_workers: int, threads: int
) -> None:
    given = []
    monkeypatch.setattr(study, "take_runs", lambda _, queue, threads, look: given.append(threads))
    monkeypatch.setattr(study, "run_workers", lambda *arguments: given.append(arguments[-1]))
    monkeypatch.setattr(machine, "count_cores", lambda: 4)
    study.run_study(bench.write(), bench.out, n_workers, None)
    assert given == [threads]

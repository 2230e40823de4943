"""A process that runs cases of hostile.py and stops what no file may bring about.

`python watched.py FOLDER` reads the name of a case from each line, as JSON, and prints what
happened in one; test_hostile_files.py judges.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile import NEW, SECRET, STEP, Case, cases, used

from gptlite.core.weights import FILES

WATCHED = (
    "pickle.find_class",
    "subprocess.Popen",
    *("os.exec", "os.system", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen"),
)
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SECONDS = 5


class Forbidden(Exception):
    """Raised by the watch instead of letting it happen."""


class Watch:
    """Notes and stops what no file may bring about; `folder` is where a case may write."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if what := self.forbidden(event, arguments):
            self.seen.append(what)
            raise Forbidden(what)

    def forbidden(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in WATCHED and not (event == "ctypes.dlopen" and arguments[0] is None):
            return f"{event}{arguments!r:.200}"
        if event == "compile" and "canary" in str(arguments[0]):
            return f"compile {arguments[1]}"
        if event == "exec":
            code = arguments[0]
            ours = "canary" in code.co_names + code.co_consts or self.inside(code.co_filename)
            return f"exec {code.co_filename}" if ours else None
        written: tuple[Any, ...] = ()
        if event in WRITES:
            written = arguments[: 1 + (event in ("os.rename", "os.link", "os.symlink"))]
        elif event == "open" and arguments[2] & WRITING:
            written = arguments[:1]
        follows = event == "open" and not arguments[2] & os.O_NOFOLLOW
        for path in written:
            if not isinstance(path, int) and not self.inside(os.fsdecode(path), follows):
                return f"{event} outside: {path}"
        return None

    def inside(self, path: str, follows: bool = True) -> bool:
        if path == os.devnull:
            return True
        above, name = os.path.split(os.path.abspath(path))
        real = os.path.realpath(path) if follows else os.path.join(os.path.realpath(above), name)
        return real.startswith(f"{self.folder}{os.sep}")


def run(case: Case, model: Path, folder: Path, watch: Watch) -> dict[str, Any]:
    """One case in a folder of its own."""
    from typer.testing import CliRunner

    from gptlite.cli.main import app

    shutil.copytree(model, folder / "copy")
    os.chdir(folder)
    SECRET.write_text("kept")
    case.lay()
    before = {str(path) for path in folder.rglob("*")}
    started, watch.folder = time.perf_counter(), folder
    signal.alarm(SECONDS)
    try:
        with little_memory() if case.name.startswith("header") else contextlib.nullcontext():
            result = CliRunner().invoke(app, case.command)
    finally:
        signal.alarm(0)
        watch.folder = None
    seen, watch.seen = watch.seen, []
    output = result.stdout + result.stderr
    return {
        "code": result.exit_code,
        "stderr": result.stderr[:3000],
        "lines": len(result.stderr.splitlines()),
        "seen": seen,
        "made": sorted({str(path) for path in folder.rglob("*")} - before),
        "canary": any(True for _ in folder.parent.rglob("canary")),
        "secret": SECRET.read_text(),
        "foreign": "Traceback" in output or "a bug" in output,
        "seconds": time.perf_counter() - started,
    }


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """No more address space than now, for the weights' file and for 64 MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize()
    limit += (STEP / FILES[0]).stat().st_size + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def asleep(number: int, frame: Any) -> None:
    raise TimeoutError("the case hangs")


def main(folder: Path) -> None:
    from test_bad_input import make_run

    model = make_run(folder)
    signal.signal(signal.SIGALRM, asleep)
    watch = Watch()
    good = [*used(), ["train", "--resume", "copy"], ["prepare", "-c", "copy/config.yaml"]]
    for number, command in enumerate([*good, NEW]):  # imports whatever is imported late
        (folder / f"good-{number}").mkdir()
        done = run(Case("good", command, lambda: None), model, folder / f"good-{number}", watch)
        assert done["code"] == 0, done
    sys.addaudithook(watch)
    by_name = {case.name: case for case in cases()}
    for number, line in enumerate(sys.stdin):
        case = by_name[json.loads(line)]
        place = folder / f"{number}"
        place.mkdir()
        print(json.dumps(run(case, model, place, watch)), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""Two hosts do one study; one is killed midway, then the server is. Nothing is lost or done twice.

The hosts are two network namespaces (root alone can make them; else two processes), each with a
folder and a HOME of its own, and nothing between them but a PostgreSQL server that this script
starts in a temporary folder. Without PostgreSQL they share the study's folder and its journal.
What they find equals, to the last bit, what one process finds alone.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from gptlite.studies.database import StudyStorage

NETS = {"a": "203.0.113", "b": "198.51.100"}
"""For a wire from each host to the server; addresses for examples, unless in use here."""
SECRET = "l0ud&clear"
BASE = {
    **{"device": "cpu", "dtype": "float32", "attention": "math", "tokenizer": {"kind": "char"}},
    "data": {"source": "text.txt", "cache_dir": "cache"},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16},
    "train": {
        **{"max_steps": 800, "batch_size": 8, "threads": 1},
        **{"eval_interval": 100, "save_interval": 100},
    },
    "sample": {"max_new_tokens": 8},
}
STUDY = {
    "base": "base.yaml",
    "axes": {"optim.lr": [0.001, 0.003], "dropout.rate": [0, 0.3]},
    "seeds": [1, 2],
}
N_RUNS = 8


def main() -> None:
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chmod(work, 0o755)  # the server is another user
        wires = stack.enter_context(make_namespaces())
        server = stack.enter_context(start_postgres(work, wires))
        print(f"hosts: {'two network namespaces' if wires else 'two processes'}")
        print(f"queue: {'PostgreSQL' if server else 'the journal in a shared folder'}")
        hosts = [Host(name, work, server, wires) for name in NETS]
        do_one_study(hosts, work)
        if server:
            interrupt_server(hosts[0], server)
            check_passwords(hosts)
    print("all is well")


class Host:
    """A folder with the study's files, and how to start the command there."""

    def __init__(self, name: str, work: Path, server: "Server | None", wired: bool) -> None:
        self.name, self.folder, self.wired, self.server = name, work / name, wired, server
        (self.folder / "home").mkdir(parents=True)
        self.out = self.folder / "studies" / "tiny" if server else work / "shared"
        write_study(self.folder, "tiny", STUDY)
        self.processes: list[subprocess.Popen[str]] = []
        self.output = ""

    def start(self, study: str = "tiny", out: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gptlite", "study", f"{study}.yaml"]
        command += ["--out-dir", str(out or self.out)]
        if self.server:
            command += ["--storage", self.server.url(self.name if self.wired else None)]
        if self.wired:
            named = f'hostname {self.name}; exec "$@"'
            namespace = ["ip", "netns", "exec", f"gptlite-{self.name}", "unshare", "--uts"]
            command = [*namespace, "sh", "-c", named, "sh", *command]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def finish(self) -> tuple[int, str, str]:
        out, err = self.processes[-1].communicate(timeout=600)
        self.output += out + err
        return self.processes[-1].returncode, out, err

    def finished_runs(self, out: Path | None = None) -> dict[str, int]:
        """When each finished run was."""
        found = (out or self.out).glob("runs/*/summary.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}

    def unfinished_runs(self, out: Path | None = None) -> set[str]:
        found = {path.parent.name for path in (out or self.out).glob("runs/*/metrics.jsonl")}
        return found - set(self.finished_runs(out))


def do_one_study(hosts: list[Host], work: Path) -> None:
    a, b = hosts
    for host in hosts:  # at once: both find a database without tables
        host.start()
    wait_until(
        lambda: b.finished_runs() and b.unfinished_runs(),
        b.processes[0],
        "host b is at its second run",
    )
    b.processes[0].send_signal(signal.SIGKILL)
    b.finish()
    before = b.finished_runs()
    b.start()
    for host in hosts:
        code, _, err = host.finish()
        assert code == 0, err
    tables = []
    for host in hosts:  # whoever was done first has not seen all
        host.start()
        code, out, err = host.finish()
        assert code == 0, err
        tables.append(out)
    assert tables[0] == tables[1], tables
    assert f"{N_RUNS} of {N_RUNS} runs done" in tables[0], tables[0]
    print(tables[0])
    assert before.items() <= b.finished_runs().items(), "a finished run was trained again"
    check_shares(hosts)
    check_numbers(a, work)


def check_shares(hosts: list[Host]) -> None:
    """Each run was done once, and each host did some."""
    a, b = hosts
    store = StudyStorage(a.out / "journal.log", a.server.url(None) if a.server else None)
    trials = [t for t in store.open_study("tiny").get_trials() if t.user_attrs.get("runs")]
    names = [run["name"] for trial in trials for run in trial.user_attrs["runs"]]
    assert len(names) == len(set(names)) == N_RUNS, names
    by = [int(trial.user_attrs["worker"].split("-")[-2]) for trial in trials]
    shares = [sum(pid in [p.pid for p in host.processes] for pid in by) for host in hosts]
    assert min(shares) > 0, shares
    assert sum(shares) == N_RUNS, shares
    if a.server:
        assert not set(a.finished_runs()) & set(b.finished_runs()), "both hosts trained a run"
        assert sorted([*a.finished_runs(), *b.finished_runs()]) == sorted(names)
    logs = {log for host in hosts for log in host.out.glob("runs/*/train.log")}
    ends = [log.read_text().count("done: ") for log in logs]
    assert max(ends) == 1, "a run was trained to its end twice"
    print(f"each of {N_RUNS} runs was done once: {shares[0]} by host a, {shares[1]} by host b")


def check_numbers(host: Host, work: Path) -> None:
    """Against those of one process alone."""
    alone = work / "alone"
    alone.mkdir()
    write_study(alone, "tiny", STUDY)
    command = [sys.executable, "-m", "gptlite", "study", "tiny.yaml", "--json"]
    straight = json.loads(subprocess.run(command, cwd=alone, check=True, **QUIET).stdout)
    found = json.loads((host.out / "study.json").read_text())
    for one, other in zip(found["runs"], straight["runs"], strict=True):
        assert one["name"] == other["name"]
        assert without_clock(one) == without_clock(other), (one, other)
    print("and its numbers are, bit for bit, those of one process")


QUIET: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}


def without_clock(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run["metrics"].items() if name != "seconds"}


def interrupt_server(host: Host, server: "Server") -> None:
    write_study(host.folder, "again", {**STUDY, "set": {"optim.weight_decay": 0.2}, "seeds": [1]})
    out = host.folder / "studies" / "again"
    process = host.start("again", out)
    wait_until(
        lambda: host.finished_runs(out) and host.unfinished_runs(out),
        process,
        "the second run has begun",
    )
    server.stop()
    code, _, err = host.finish()
    lines = [line for line in err.splitlines() if "best validation loss" not in line]
    assert lines.pop(0) == "again: 0 of 4"
    assert (code, len(lines)) == (5, 1), (code, err)
    print(f"without its server it says: {lines[0]}")
    before = host.finished_runs(out)
    host.start("again", out)
    code, _, err = host.finish()
    assert (code, err.count("\n")) == (5, 1), (code, err)
    server.start()
    host.start("again", out)
    code, told, err = host.finish()
    assert code == 0, err
    assert "4 of 4 runs done" in told
    assert before.items() <= host.finished_runs(out).items(), "a finished run was trained again"
    print(f"with its server again it goes on; {len(before)} finished runs stayed")


def check_passwords(hosts: list[Host]) -> None:
    """That of the database is nowhere."""
    for host in hosts:
        words = (SECRET, SECRET.replace("&", "%26"))
        assert not any(word in host.output for word in words), "the password was printed"
        for path in host.folder.rglob("*"):
            raw = path.read_bytes() if path.is_file() else b""
            assert not any(word.encode() in raw for word in words), f"the password is in {path}"
    print("the password of the database was neither printed nor written")


class Server:
    """PostgreSQL in a folder, by a user that is not root."""

    def __init__(self, binaries: Path, folder: Path, wired: bool) -> None:
        self.binaries, self.folder = binaries, folder
        self.user = "postgres" if os.geteuid() == 0 else None
        folder.mkdir()
        if self.user:
            shutil.chown(folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder.parent / "password").write_text(SECRET)
        given = ["-A", "scram-sha-256", "-U", "study", f"--pwfile={folder.parent}/password"]
        self.call("initdb", "-D", f"{folder}/db", *given)
        nets = [f"{net}.1" for net in NETS.values()] if wired else []
        with (folder / "db" / "pg_hba.conf").open("a") as file:
            file.writelines(f"host all all {net}/24 scram-sha-256\n" for net in nets)
        with (folder / "db" / "postgresql.conf").open("a") as file:
            file.write(f"port = {self.port}\nunix_socket_directories = '{folder}'\nfsync = off\n")
            file.write(f"listen_addresses = '{','.join(['127.0.0.1', *nets])}'\n")
        self.start()

    def call(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        quiet = subprocess.DEVNULL
        subprocess.run(command, user=self.user, cwd="/", check=True, stdout=quiet, stderr=quiet)

    def start(self) -> None:
        self.call("pg_ctl", "-D", f"{self.folder}/db", "-w", "-l", f"{self.folder}/log", "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-D", f"{self.folder}/db", "-m", "immediate", "stop")

    def url(self, host: str | None) -> str:
        at = f"{NETS[host]}.1" if host else "127.0.0.1"
        return f"postgresql+psycopg://study:{SECRET.replace('&', '%26')}@{at}:{self.port}/postgres"


@contextmanager
def start_postgres(work: Path, wired: bool) -> Iterator[Server | None]:
    found = [
        Path(shutil.which("initdb") or "none"),
        *Path("/usr/lib/postgresql").glob("*/bin/initdb"),
    ]
    programs = [path for path in found if path.is_file()]
    known = os.geteuid() != 0 or "postgres" in [user.pw_name for user in pwd.getpwall()]
    if not programs or not known or find_spec("psycopg") is None:
        yield None
        return
    server = Server(programs[-1].parent, work / "server", wired)
    try:
        yield server
    except BaseException:
        print((server.folder / "log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        server.stop()


@contextmanager
def make_namespaces() -> Iterator[bool]:
    """Two, each with a wire to us; False where they cannot be made."""
    tried = can_wire()
    try:
        yield tried and all(wire(host, net) for host, net in NETS.items())
    finally:
        for host in NETS if tried else ():
            call("ip", "netns", "del", f"gptlite-{host}")
            call("ip", "link", "del", f"gptlite-{host}0")


def can_wire() -> bool:
    """Not where the addresses are in use: this machine would lose its own network."""
    if not shutil.which("ip") or os.geteuid() != 0:
        return False
    shown = [["ip", "-4", "addr"], ["ip", "-4", "route"], ["ip", "netns", "list"]]
    used = "".join(subprocess.run(command, **QUIET, check=False).stdout for command in shown)
    return not any(name in used for name in (*NETS.values(), "gptlite-"))


def wire(host: str, net: str) -> bool:
    space = f"gptlite-{host}"
    here, there = f"{space}0", f"{space}1"
    return all(
        call(*line.split())
        for line in (
            f"ip netns add {space}",
            f"ip link add {here} type veth peer name {there} netns {space}",
            f"ip addr add {net}.1/24 dev {here}",
            f"ip link set {here} up",
            f"ip -n {space} addr add {net}.2/24 dev {there}",
            f"ip -n {space} link set {there} up",
            f"ip -n {space} link set lo up",
        )
    )


def call(*command: str) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def write_study(folder: Path, name: str, study: dict[str, Any]) -> None:
    text = (" ".join(f"{number * number % 97}" for number in range(j, j + 12)) for j in range(600))
    (folder / "text.txt").write_text("\n".join(text))
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    end = time.monotonic() + 300
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"ended before {what}: {process.communicate()[1]}")
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


if __name__ == "__main__":
    main()

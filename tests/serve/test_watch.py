"""The page's view of runs: what they are doing, and that watching changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Workshop, merged
from service import serving, train_tiny

from gptlite.runs.directory import hold_directory, state_of
from gptlite.serve import watch as watching
from gptlite.serve.watch import Watch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections: dict[str, Any] = {"dropout": {"rate": 0.1}, "sample": {"interval": 2}}
    return train_tiny(tmp_path_factory.mktemp("watch"), **sections)


def test_a_run_is_told_in_numbers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    with serving(tiny) as client:
        (run,) = client.get("/api/runs").json()["runs"]
        whole = client.get("/api/runs/tiny").json()
        assert client.get("/api/runs/none").status_code == 404
    rows = [json.loads(line) for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    assert run["name"] == "tiny"
    assert run["state"] == "finished"
    assert run["step"] == run["max_steps"] == rows[-1]["step"]
    assert run["best_loss"] == min(row["val/loss"] for row in rows if "val/loss" in row)
    assert whole["series"]["step"] == [row["step"] for row in rows]
    for name in ("train/loss", "val/loss", "lr", "dropout/embedding"):
        assert whole["series"][name] == [row.get(name) for row in rows]
    assert [sample["step"] for sample in whole["samples"]] == sorted(
        int(path.stem[5:]) for path in (tiny / "samples").iterdir()
    )
    assert whole["advice"]["title"]
    assert "rate: 0.1" in whole["config"]


def test_states_are_told_apart(workshop: Workshop) -> None:
    directory = workshop.folder / "run"
    directory.mkdir()
    assert state_of(directory) == "interrupted"
    with hold_directory(directory):
        assert state_of(directory) == "running"
        assert state_of(directory) == "running"  # looking has not let it go
    assert state_of(directory) == "interrupted"
    (directory / "summary.json").write_text("{}")
    assert state_of(directory) == "finished"
    code = "import sys, os; from pathlib import Path; from gptlite.runs.directory import "
    code += "hold_directory\nwith hold_directory(Path(sys.argv[1])): os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(directory)], check=False)
    assert state_of(directory) == "dead"


def test_a_damaged_run_is_listed_all_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, files in (
        ("empty", {"config.yaml": ""}),
        ("odd", {"config.yaml": "[", "metrics.jsonl": '{"step": 1}\n{"step', "plan.json": "[]"}),
        ("null", {"config.yaml": "seed: 1", "metrics.jsonl": '{"step": 2, "val/loss": null}\n'}),
    ):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    with serving() as client:
        found = client.get("/api/runs").json()["runs"]
        assert [run["name"] for run in found] == ["empty", "null", "odd"]
        for run in found:
            assert client.get(f"/api/runs/{run['name']}").status_code == 200


def test_runs_of_one_name_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "tiny"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("seed: 1")
    assert list(Watch([tiny, other]).directories()) == ["tiny", "elsewhere/tiny"]
    with serving(tiny) as client:
        client.service.watch.named.append(other)
        assert client.get("/api/runs/elsewhere%2Ftiny").json()["name"] == "elsewhere/tiny"


def test_long_curves_are_thinned_and_keep_every_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "MOST_POINTS", 10)
    rows = [{"step": at, "val/loss": 1.0 if at % 33 == 0 else None} for at in range(1, 101)]
    kept = [row["step"] for row in watching.thin(rows)]
    assert len(kept) < 20
    assert kept[-1] == 100
    assert {33, 66, 99} <= set(kept)


def test_training_is_the_same_with_the_page_open(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process trains while another asks for its runs as fast as it can."""
    monkeypatch.chdir(workshop.folder)
    config = workshop.folder / "config.yaml"
    data = {"source": str(workshop.text), "cache_dir": str(workshop.folder / "cache")}
    sizes = {"max_steps": 60, "eval_interval": 10}
    config.write_text(yaml.safe_dump(merged(TINY, {"data": data, "train": sizes})))

    def train(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gptlite", "train", "--config", str(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--out-dir", f"runs/{name}"], stderr=subprocess.DEVNULL, env=environment
        )

    assert train("alone").wait(120) == 0
    process, states = train("watched"), set()
    with serving() as client:
        while process.poll() is None:
            for run in client.get("/api/runs").json()["runs"]:
                states.add(run["state"])
                client.get(f"/api/runs/{run['name']}")
    assert process.returncode == 0
    assert {"running", "finished"} <= states
    losses = [
        [
            {key: row[key] for key in row if "loss" in key or key == "lr"}
            for row in map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())
        ]
        for name in ("alone", "watched")
    ]
    assert losses[0] == losses[1]
    alone, watched = (
        next(Path(f"runs/{name}/checkpoints").glob("step-*60/model.safetensors")).read_bytes()
        for name in ("alone", "watched")
    )
    assert alone == watched


def test_a_killed_run_is_dead(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.folder)
    config = workshop.folder / "config.yaml"
    data = {"source": str(workshop.text), "cache_dir": str(workshop.folder / "cache")}
    config.write_text(
        yaml.safe_dump(merged(TINY, {"data": data, "train": {"max_steps": 1_000_000}}))
    )
    command = [sys.executable, "-m", "gptlite", "train", "--config", str(config)]
    process = subprocess.Popen([*command, "--out-dir", "runs/r"], stderr=subprocess.DEVNULL)
    watch = Watch([])
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            runs = watch.list_runs()["runs"]
            if runs and runs[0]["state"] == "running" and runs[0]["step"]:
                break
            time.sleep(0.05)
        assert runs[0]["left_seconds"] > 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert watch.list_runs()["runs"][0]["state"] == "dead"

"""Checkpoints are whole or absent, verified when read, and never pickles."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import state_at
from safetensors.torch import save_file

from gptlite import storage
from gptlite.config.run import ModelConfig
from gptlite.core import tensor_files
from gptlite.core.model import GPT
from gptlite.core.weights import FILES, model_tensors
from gptlite.errors import CheckpointError, ConfigError, DivergedError, StorageError
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import Checkpoint

SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8)


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    model = GPT(SMALL, 20, seed=seed)
    return dict(zip(FILES, (model_tensors(model), {"a:b": torch.ones(3)}), strict=True))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def save(run_dir: Path, step: int, **state: Any) -> Path:
    return checkpoint.save(run_dir, tensors(step), state_at(step, **state))


def recover(run_dir: Path) -> Checkpoint | None:
    return checkpoint.recover(run_dir, lambda state: None)


def test_a_checkpoint_comes_back_as_it_was(run_dir: Path) -> None:
    path = save(run_dir, 7)
    assert checkpoint.read_state(path).step == 7
    model = GPT(SMALL, 20, seed=99)
    checkpoint.load_weights(model, path)
    for name, tensor in tensors(7)[FILES[0]].items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, "state.json"])


def test_a_tied_matrix_is_stored_once(run_dir: Path) -> None:
    assert "head.weight" not in tensor_files.read_tensors(save(run_dir, 1) / FILES[0])


def test_a_failed_save_leaves_what_was_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run_dir, 1)

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_ATTEMPTS", 0)
    with pytest.raises(StorageError, match="No space left"):
        save(run_dir, 2)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_disk_that_fails_once_is_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, sync = iter([OSError(5, "Input/output error")] * 2), storage.disk.sync

    def twice_broken(path: Path) -> None:
        for failure in failures:
            raise failure
        sync(path)

    monkeypatch.setattr(storage.disk, "sync", twice_broken)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_ATTEMPTS", 0)
    assert checkpoint.read_state(save(run_dir, 2)).step == 2
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]


def test_free_space_is_asked_first(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(run_dir)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_ATTEMPTS", 0)
    with pytest.raises(StorageError, match="free disk"):
        save(run_dir, 2)


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_every_flipped_byte_and_every_truncation_is_noticed(run_dir: Path, name: str) -> None:
    path = save(run_dir, 1)
    whole = (path / name).read_bytes()
    places = sorted({0, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2})
    for at in places:
        flipped = bytearray(whole)
        flipped[at] ^= 1
        for damaged in (bytes(flipped), whole[:at]):
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                checkpoint.read_state(path)
    (path / name).write_bytes(whole)
    assert checkpoint.read_state(path).step == 1


def test_a_bad_checkpoint_is_passed_over_and_named(run_dir: Path) -> None:
    save(run_dir, 1)
    bad = save(run_dir, 2)
    (bad / FILES[0]).write_bytes(b"junk")
    found = recover(run_dir)
    assert found is not None
    path, state, problems = found
    assert (path.name, state.step) == ("step-00000001", 1)
    assert "step-00000002" in problems[0]
    assert (run_dir / "checkpoints" / "step-00000002.corrupt").is_dir()


def test_a_run_never_starts_over_silently(run_dir: Path) -> None:
    """No checkpoint at all is a fresh start; only broken ones are exit code 3."""
    assert recover(run_dir) is None
    bad = save(run_dir, 1)
    (bad / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
        recover(run_dir)
    assert caught.value.exit_code == 3


def test_pruning_keeps_the_newest_and_the_best_and_nothing_foreign_goes(run_dir: Path) -> None:
    for step in range(1, 6):
        save(run_dir, step)
    foreign = run_dir / "checkpoints" / "step-mine"
    foreign.mkdir()
    checkpoint.write_pointer(run_dir, "best", 2)
    checkpoint.prune(run_dir, 2, 2)
    kept = [p.name for p in checkpoint.folders(run_dir)]
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert foreign.is_dir()
    checkpoint.prune(run_dir, "all", None)
    assert len(checkpoint.folders(run_dir)) == 3


def test_checkpoints_are_chosen_by_name(run_dir: Path) -> None:
    save(run_dir, 3)
    checkpoint.write_pointer(run_dir, "last", 3)
    assert checkpoint.choose(run_dir, "last") == checkpoint.choose(run_dir, "step-3")
    assert checkpoint.choose(run_dir, "best").path.name == "step-00000003"
    with pytest.raises(CheckpointError, match="no checkpoint 'step-4'; there are: step-00000003"):
        checkpoint.choose(run_dir, "step-4")
    with pytest.raises(ConfigError, match="expected best, last or step-N"):
        checkpoint.choose(run_dir, "../../etc")


@pytest.mark.parametrize("which", ["best", "last"])
def test_for_a_damaged_checkpoint_the_newest_good_one_stands_in(run_dir: Path, which: str) -> None:
    """Not the oldest, not a damaged one, and never for one asked for by its number."""
    for step in range(1, 6):
        save(run_dir, step)
    checkpoint.write_pointer(run_dir, which, 3)
    for step in (3, 5):
        (run_dir / "checkpoints" / f"step-0000000{step}" / FILES[0]).write_bytes(b"x")
    found = checkpoint.choose(run_dir, which)
    assert found.state.step == 4
    assert len(found.problems) == 2
    assert "step-00000003" in found.problems[0]
    assert "step-00000005" in found.problems[1]
    with pytest.raises(CheckpointError, match="step-00000003"):
        checkpoint.choose(run_dir, "step-3")


def test_weights_of_another_shape_are_named(run_dir: Path) -> None:
    path = save(run_dir, 1)
    with pytest.raises(CheckpointError, match=r"2 weights do not fit this model: blocks\.0\.mlp"):
        checkpoint.load_weights(GPT(SMALL.model_copy(update={"mlp": "swiglu"}), 20), path)


def test_weights_that_are_not_finite_are_refused(run_dir: Path) -> None:
    broken = tensors()
    broken[FILES[0]]["norm.weight"][0] = float("nan")
    with pytest.raises(DivergedError, match=r"step 1: not finite, so not saved: norm\.weight"):
        checkpoint.save(run_dir, broken, state_at(1))
    save_file(broken[FILES[0]], run_dir / FILES[0])
    with pytest.raises(CheckpointError, match=r"not finite in norm\.weight"):
        checkpoint.load_weights(GPT(SMALL, 20), run_dir)


def test_weights_that_vanish_while_they_are_opened_are_no_bug(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens a file, and torch opens it again; a run may prune it between the two."""
    path = save(run_dir, 1)

    def gone(file: Path) -> None:
        raise RuntimeError(f"unable to open file <{file}> in read-only mode")

    monkeypatch.setattr(tensor_files, "load_file", gone)
    with pytest.raises(CheckpointError, match="bad checkpoint .unable to open"):
        checkpoint.load_weights(GPT(SMALL, 20), path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(40)])
def test_files_that_may_be_pickles_are_not_opened(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "ckpt.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="never loaded"):
        checkpoint.read_state(file)


def test_a_newer_format_is_said(run_dir: Path) -> None:
    path = save(run_dir, 1)
    state = storage.unseal((path / "state.json").read_text())
    (path / "state.json").write_text(storage.seal({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_state(path)

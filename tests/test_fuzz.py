"""Whatever bytes a file holds: a value or an error of ours. `--hypothesis-profile=long` tries more.

Properties of encoding, cutting and sweeping stand beside their other tests.
"""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import state_at
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gptlite import storage
from gptlite.config.reader import dump
from gptlite.config.run import ModelConfig, OptimConfig, RunConfig, SampleConfig
from gptlite.core import tensor_files
from gptlite.core.model import GPT
from gptlite.core.optim import lr_at
from gptlite.core.sampling import draw, probabilities
from gptlite.core.weights import FILES, model_tensors
from gptlite.data import tokenizers
from gptlite.data.batches import Batch, Ids, batch_at
from gptlite.errors import CheckpointError, ConfigError, DataError
from gptlite.runs import checkpoint
from gptlite.runs.metrics import MetricsFile
from gptlite.runs.origin import load_run
from gptlite.storage import Disk
from gptlite.words import escape_controls

SMALL = ModelConfig(n_layer=1, n_head=1, n_embd=4, context_length=4)
CONFIGS = [path.read_bytes() for path in sorted(Path("configs").glob("*.yaml"))]


def share(part: int) -> settings:
    """For what takes longer: one in so many examples."""
    return settings(max_examples=max(1, settings().max_examples // part))


class NoSync(Disk):
    """Survives no loss of power, which is not what is tried here."""

    def sync(self, path: Path) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "disk", NoSync())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not a folder for each test: Hypothesis calls a test many times."""
    return tmp_path_factory.mktemp("fuzz")


# Bytes and values


@st.composite
def mutated(draw: st.DrawFn, *wholes: bytes) -> bytes:
    """One of these with some stretches replaced."""
    raw = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
        end = draw(st.sampled_from([end, min(end, at + 1), at]))
        raw[at:end] = draw(st.binary(max_size=6) | st.sampled_from(SPLINTERS))
    return bytes(raw)


SPLINTERS = [
    b": ",
    b"\n",
    b"- ",
    b"{",
    b"[" * 30,
    b"!!x ",
    b"&a ",
    b"*a",
    b'"',
    b"\xff",
    b"\0",
    b"9" * 40,
]
wild = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**4000])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "all", "never", "none", "keyed", "math", "~", "a\0b", "\x1b[2J"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


def replaced(plain: Any, value: Any, path: list[int]) -> Any:
    """A copy with what stands at a path of numbers replaced."""
    if not path or not isinstance(plain, dict | list) or not plain:
        return value
    out = copy.copy(plain)
    keys = list(plain) if isinstance(plain, dict) else range(len(plain))
    key = keys[path[0] % len(keys)]
    out[key] = replaced(plain[key], value, path[1:])
    return out


paths = st.lists(st.integers(0, 300), min_size=1, max_size=3)


# Configs


def sections() -> st.SearchStrategy[dict[str, Any]]:
    """Configs by the schema: keys that exist, values that may not."""
    parts: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys = {key: wild for key in inner or {}}
        parts[name] = st.fixed_dictionaries({}, optional=keys) | wild if inner else wild
    return st.fixed_dictionaries({}, optional=parts)


def plausible() -> st.SearchStrategy[dict[str, Any]]:
    """Mostly valid configs, so that contradictions are reached as well."""
    count = st.integers(1, 12)
    return st.fixed_dictionaries(
        {
            "data": st.fixed_dictionaries({"source": st.text(min_size=1, max_size=5)}),
            "train": st.fixed_dictionaries({"max_steps": count}, optional={"batch_size": count}),
            "optim": st.fixed_dictionaries(
                {"warmup_steps": count}, optional={"lr": st.floats(0, 1)}
            ),
        },
        optional={
            "model": st.dictionaries(st.sampled_from(["n_embd", "n_head", "n_kv_head"]), count),
            "dropout": st.dictionaries(st.sampled_from(["rate", "preset", "sites"]), wild),
            "seed": st.integers(-2, 2**64),
        },
    )


def read_config(folder: Path, raw: bytes) -> None:
    path = folder / "train.yaml"
    path.write_bytes(raw)
    try:
        run = load_run([str(path)], [])
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith(str(path))
            assert len(escape_controls(problem).splitlines()) == 1
            assert len(problem) < 1500
        return
    assert isinstance(run, RunConfig)
    path.write_text(dump(run), encoding="utf-8")
    assert load_run([str(path)], []) == run


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_config_or_an_error_with_its_place(folder: Path, raw: bytes) -> None:
    read_config(folder, raw)


@share(3)
@given(raw=mutated(*CONFIGS))
def test_a_damaged_config_is_a_config_or_an_error_with_its_place(folder: Path, raw: bytes) -> None:
    read_config(folder, raw)


@share(3)
@given(values=sections() | plausible())
def test_any_values_are_a_config_or_an_error_with_its_place(
    folder: Path, values: dict[str, Any]
) -> None:
    read_config(folder, yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "replace"))


# Tokenizers

BPE = tokenizers.train_bpe(["the end of the letter, and the other end. " * 20], 280)
DOCUMENTS = [
    tokenizers.ByteTokenizer(eot=True).to_json(),
    tokenizers.CharTokenizer("abc é漢", eot=True, unknown="error").to_json(),
    tokenizers.CharTokenizer("abc é漢", eot=False, unknown="replace").to_json(),
    BPE.to_json(),
]


def use(document: Any, text: str, *, exactly: bool) -> None:
    try:
        built = tokenizers.from_json(document)
        ids = built.encode(text)
    except (DataError, ConfigError) as error:
        assert len(str(error)) < 1500  # noqa: PT017
        return
    assert all(0 <= token < built.vocab_size for token in ids)
    decoded = built.decode(ids)
    assert not exactly or getattr(built, "unknown", "error") != "error" or decoded == text


@given(
    document=st.sampled_from(DOCUMENTS),
    path=paths,
    value=wild | st.sampled_from(["byte", "char", "bpe", "tiktoken", 256, 5]),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_any_document_is_a_tokenizer_that_works_or_an_error(
    document: Any, path: list[int], value: Any, text: str
) -> None:
    changed = replaced(document, value, path)
    use(changed, text, exactly=changed.get("pattern") == document.get("pattern"))


patterns = st.lists(
    st.sampled_from(
        [*"ab. ()[]|*+?\\{}^$", r"\s", r"\S", "(?=", "(?!", "(?<", "(?:", r"\1", "{9}"]
    ),
    max_size=9,
)


@given(pattern=patterns.map("".join), text=st.text("ab \n,", max_size=40))
def test_any_pattern_splits_text_or_is_an_error(pattern: str, text: str) -> None:
    """What tiktoken panics at is no Exception."""
    use({**BPE.to_json(), "pattern": pattern}, text, exactly=False)


@given(raw=mutated(storage.seal(DOCUMENTS[1]).encode()) | st.binary(max_size=60))
def test_any_bytes_are_a_tokenizer_or_an_error(folder: Path, raw: bytes) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(raw)
    if raw.decode("utf-8", "replace") != storage.seal(DOCUMENTS[1]):
        with pytest.raises(DataError, match="tokenizer.json: "):
            tokenizers.read_tokenizer(path)


# Checkpoints


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    model = model_tensors(GPT(SMALL, 5))
    return dict(zip(FILES, (model, {"a:b": torch.ones(3)}), strict=True))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint at step 7."""
    run_dir = tmp_path_factory.mktemp("good")
    (run_dir / "checkpoints").mkdir()
    pending = {"step": 7, "tokens_per_second": 1.0, "train/loss": None}
    checkpoint.save(run_dir, tensors(), state_at(7, pending=pending, skipped=[3]))
    checkpoint.write_pointer(run_dir, "last", 7)
    return run_dir


def altered(good: Path, folder: Path, name: str, raw: bytes, seal: bool) -> Path:
    """The checkpoint with one file replaced; sealed anew if asked for."""
    path = folder / "step-00000007"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good / "checkpoints" / path.name, path)
    (path / name).write_bytes(raw)
    if seal:
        state = storage.unseal((path / "state.json").read_text())
        files = {**state["files"], name: storage.file_digest(path / name)}
        (path / "state.json").write_text(storage.seal({**state, "files": files}))
    return path


def read_checkpoint(path: Path) -> Any:
    """All that is in a checkpoint; None for a CheckpointError."""
    model = GPT(SMALL, 5)
    try:
        state = checkpoint.read_state(path)
        checkpoint.load_weights(model, path)
        moments = tensor_files.read_tensors(path / FILES[1])
    except CheckpointError as error:
        assert all(len(escape_controls(problem)) < 1500 for problem in error.problems)  # noqa: PT017
        return None
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return state, model.state_dict(), moments


def same(a: Any, b: Any) -> bool:
    return a[0] == b[0] and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(a[1:], b[1:], strict=True)
    )


@share(2)
@given(data=st.data(), name=st.sampled_from([*FILES, "state.json"]))
def test_a_damaged_checkpoint_is_noticed(good: Path, folder: Path, data: Any, name: str) -> None:
    whole = (good / "checkpoints/step-00000007" / name).read_bytes()
    raw = data.draw(mutated(whole))
    got = read_checkpoint(altered(good, folder, name, raw, seal=False))
    assert (
        got is None
        if raw != whole
        else same(got, read_checkpoint(good / "checkpoints/step-00000007"))
    )


@share(2)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_tensors_sealed_by_an_enemy_are_finite_or_refused(
    good: Path, folder: Path, data: Any, name: str
) -> None:
    whole = (good / "checkpoints/step-00000007" / name).read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    described = json.loads(whole[8:size])
    new = replaced(described, data.draw(wild), data.draw(paths))
    text = json.dumps(new).encode()
    head = len(text).to_bytes(8, "little") + text
    raw = data.draw(mutated(whole, whole[:size]) | st.just(head + whole[size:]) | st.binary())
    read_checkpoint(altered(good, folder, name, raw, seal=True))


@given(path=paths, value=wild)
def test_a_state_sealed_by_an_enemy_is_a_state_or_refused(
    good: Path, folder: Path, path: list[int], value: Any
) -> None:
    at = altered(good, folder, "junk", b"", seal=False)
    (at / "junk").unlink()
    state = replaced(storage.unseal((at / "state.json").read_text()), value, path)
    (at / "state.json").write_text(storage.seal(state))
    read_checkpoint(at)


@given(
    raw=st.binary(max_size=80) | mutated(b"step-00000007\n"),
    which=st.sampled_from(["best", "last"]),
)
def test_any_pointer_names_a_checkpoint_or_none(good: Path, raw: bytes, which: str) -> None:
    (good / "checkpoints" / which).write_bytes(raw)
    name = checkpoint.read_pointer(good, which)
    assert name is None or checkpoint.FOLDER.match(name)
    try:
        assert checkpoint.choose(good, which).state.step == 7
    except CheckpointError:
        assert name is None


# Metrics


rows = st.dictionaries(
    st.sampled_from(["step", "train/loss", "a"]), st.integers(-9, 9) | wild, max_size=3
)
lines = (
    st.binary(max_size=20)
    | rows.map(lambda row: json.dumps(row).encode())
    | st.integers(0, 20).map(lambda step: json.dumps({"step": step, "é": 0.5}).encode())
)


def is_row(line: bytes, step: int) -> bool:
    try:
        row = json.loads(str(line, "utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and type(row.get("step")) is int and row["step"] <= step


@given(parts=st.lists(lines, max_size=8), ends=st.booleans(), step=st.integers(0, 20))
def test_metrics_keep_exactly_the_rows_until_the_step(
    folder: Path, parts: list[bytes], ends: bool, step: int
) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(parts) + b"\n" * ends)
    every = path.read_bytes().split(b"\n")
    MetricsFile(path, step).write({"step": step + 1, "train/loss": math.nan})
    *kept, last = path.read_bytes().split(b"\n")[:-1]
    assert kept == [line for line in every if is_row(line, step)]
    assert json.loads(last) == {"step": step + 1, "train/loss": None}


# Retention


class Retention(RuleBasedStateMachine):
    """Saving, pruning, crashing and corrupting in any order, against a plain account of it."""

    FOREIGN = (
        "step-mine",
        "step-0000001",
        "step-000000010",
        "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661",
        "notes.txt",
    )

    @initialize(keep=st.sampled_from([2, 3, "all"]))
    def begin(self, keep: int | str) -> None:
        self.run_dir = Path(MACHINE_FOLDER[0]) / "run"
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.at = self.run_dir / "checkpoints"
        self.at.mkdir(parents=True)
        for name in self.FOREIGN:
            (self.at / name).mkdir() if name != "notes.txt" else (self.at / name).touch()
        self.keep, self.step = keep, 0
        self.best: int | None = None
        self.valid: set[int] = set()

    def state(self) -> Any:
        return state_at(self.step)

    @rule(gain=st.integers(1, 3), is_best=st.booleans())
    def save(self, gain: int, is_best: bool) -> None:
        self.step += gain
        part = {"w": torch.full((2,), float(self.step))}
        checkpoint.save(self.run_dir, {FILES[0]: part, FILES[1]: {}}, self.state())
        self.valid.add(self.step)
        checkpoint.write_pointer(self.run_dir, "last", self.step)
        if is_best:
            checkpoint.write_pointer(self.run_dir, "best", self.step)
            self.best = self.step
        have = [int(path.name[5:]) for path in checkpoint.folders(self.run_dir)]
        checkpoint.prune(self.run_dir, self.keep, self.best)
        newest = have if self.keep == "all" else have[-int(self.keep) :]
        self.valid &= {*newest, *([] if self.best is None else [self.best])}

    @rule()
    def crash_in_a_save(self) -> None:
        part = storage.temporary_path(self.at / checkpoint.folder_name(self.step + 1))
        part.mkdir()
        (part / FILES[0]).write_bytes(b"half")

    @rule()
    def crash_in_pruning(self) -> None:
        storage.temporary_path(self.at / checkpoint.folder_name(0), "old").mkdir()

    @precondition(lambda self: len(self.valid) > 1)
    @rule(
        number=st.integers(0, 99), part=st.sampled_from([*FILES, "state.json"]), gone=st.booleans()
    )
    def corrupt(self, number: int, part: str, gone: bool) -> None:
        step = sorted(self.valid)[number % len(self.valid)]
        path = self.at / checkpoint.folder_name(step) / part
        path.unlink() if gone else path.write_bytes(b"junk")
        self.valid.discard(step)

    @rule()
    def restart(self) -> None:
        storage.remove_leftovers(self.at)
        assert not [path for path in self.at.iterdir() if path.name.startswith(".")]
        if self.step == 0:
            assert checkpoint.recover(self.run_dir, lambda state: None) is None
            return
        found = checkpoint.recover(self.run_dir, lambda state: None)
        assert found is not None
        assert found.state.step == max(self.valid)
        self.step = found.state.step
        if self.best is not None and self.best > self.step:
            self.best = None

    @invariant()
    def what_is_good_is_still_there(self) -> None:
        if not hasattr(self, "valid"):
            return
        for step in self.valid:
            read = checkpoint.read_state(self.at / checkpoint.folder_name(step))
            assert read.step == step
        assert bool(self.valid) == (self.step > 0)
        if self.step:
            assert checkpoint.choose(self.run_dir, "last").state.step in self.valid
        if self.best in self.valid:
            assert checkpoint.choose(self.run_dir, "best").state.step == self.best

    @invariant()
    def nothing_foreign_is_touched(self) -> None:
        if hasattr(self, "at"):
            assert all((self.at / name).exists() for name in self.FOREIGN)


MACHINE_FOLDER: list[Path] = []


def test_no_order_of_events_loses_the_newest_good_checkpoint(folder: Path) -> None:
    MACHINE_FOLDER[:] = [folder]
    run_state_machine_as_test(Retention, settings=share(6))


# Numbers


@given(
    lr=st.floats(1e-300, 1e100),
    share_of_lr=st.floats(0, 1),
    warmup=st.integers(0, 10**6),
    more=st.integers(1, 10**6),
    at=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
)
def test_a_learning_rate_is_within_its_bounds_everywhere(
    lr: float, share_of_lr: float, warmup: int, more: int, at: float, schedule: str
) -> None:
    values = {"lr": lr, "min_lr": lr * share_of_lr, "warmup_steps": warmup, "schedule": schedule}
    optim, steps = OptimConfig.model_validate(values), warmup + more
    for step in {0, warmup, max(0, warmup - 1), int(at * (steps - 1)), steps - 1, steps, steps + 5}:
        rate = lr_at(step, steps, optim)
        assert math.isfinite(rate)
        low = 0 if step < warmup else max(0, optim.min_lr - 1e-9 * lr)
        assert low <= rate <= lr * (1 + 1e-9)


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    temperature=st.floats(0, allow_infinity=False),
    top_k=st.none() | st.integers(1, 2**39),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
    penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_any_logits_and_options_draw_a_token_of_some_probability(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    chance: float,
) -> None:
    row = torch.tensor([logits])
    options = SampleConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    probability = probabilities(row, torch.ones_like(row, dtype=torch.bool), options)
    assert probability.isfinite().all()
    assert probability.sum().item() == pytest.approx(1, abs=1e-4)
    token = draw(probability, torch.tensor([chance], dtype=torch.float64))
    assert probability[0, token] > 0


class Spy:
    """A layout that only notes which rows it is asked for."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.asked: list[tuple[int, int]] = []

    def cut(self, index: Ids, epoch: Ids, seed: int) -> Batch:
        self.asked += zip(epoch.tolist(), index.tolist(), strict=True)
        return Batch(index, index, None)

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        return iter(())


@share(3)
@given(
    n=st.integers(1, 300) | st.integers(4090, 9000), seed=st.integers(0, 2**63 - 1), data=st.data()
)
def test_every_row_is_taken_once_an_epoch(n: int, seed: int, data: Any) -> None:
    size = data.draw(st.integers(max(1, n // 20), 3 * n))
    spy = Spy(n)
    for step in range(-(-2 * n // size)):
        batch_at(spy, seed=seed, step=step, batch_size=size)
    for epoch in (0, 1):
        taken = [index for number, index in spy.asked if number == epoch]
        assert sorted(taken) == list(range(n))
    assert spy.asked == sorted(spy.asked, key=lambda pair: pair[0])

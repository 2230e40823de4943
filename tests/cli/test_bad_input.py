"""Input that cannot be meant: one line per problem with its place, the exit code, nothing left.

The cases are the tables in corpus/; Y configs, K command lines, D data, T texts to measure. What
takes more than a line to set up is written out below, and what takes a process of its own is in
test_surroundings.py.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import prose
from typer.testing import CliRunner, Result

from gptlite import storage
from gptlite.cli.main import app
from gptlite.data import prepare, tokenizers
from gptlite.data.batches import Stream

CORPUS = Path(__file__).parent / "corpus"
BASE = "data:\n  source: text.txt\ntrain:\n  max_steps: 500\n"

TIKTOKEN_NAMES = (
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)
"""Under which tiktoken caches the two files of gpt2."""

WRITTEN_OUT = {"K09", "K14", "K15", "K16", "D06", "D09", "D10", "D12"}
"""Rows with functions of their own, here or in test_surroundings.py."""
ROWS = [
    f"{row}{n:02}" for row, last in (("Y", 44), ("K", 16), ("D", 18)) for n in range(1, last + 1)
]


def cases() -> Iterator[Any]:
    for path in sorted(CORPUS.glob("*.yaml")):
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        for case in table["cases"]:
            yield pytest.param({**table["defaults"], **case}, id=case["id"])


CASES = list(cases())


def content(spec: Any) -> bytes:
    """Bytes of a text, or of a list of texts, [text, times] and {hex: digits}."""
    if isinstance(spec, str):
        return spec.encode("utf-8", "surrogatepass")
    if isinstance(spec, dict):
        return bytes.fromhex(spec["hex"])
    if len(spec) == 2 and isinstance(spec[1], int):
        return content(spec[0]) * spec[1]
    return b"".join(map(content, spec))


def argument(spec: Any) -> str:
    return content(spec).decode("utf-8", "surrogatepass")


def lay_out(case: dict[str, Any]) -> None:
    """The files of a case, in the current folder."""
    files = {"text.txt": case.get("input", "Some text to read.\n"), **case.get("files", {})}
    if "adds" in case:
        files["train.yaml"] = [BASE, case["adds"]]
    elif "text" in case:
        files["train.yaml"] = case["text"]
    for name, spec in files.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if spec == {"folder": True}:
            path.mkdir()
        elif spec == {"fifo": True}:
            os.mkfifo(path)
        else:
            path.write_bytes(content(spec))


def command_line(case: dict[str, Any]) -> list[str]:
    if "generate" in case:
        words = ["generate", "--run", "{run}", "--max-new-tokens", "3", *case["generate"]]
    else:
        words = list(case.get("command", ["config", "check", "--config", "train.yaml"]))
    if "source" in case:
        words += ["--set", ["data.source=", case["source"]]]
    words += [word for override in case.get("set", []) for word in ("--set", override)]
    return [argument(word) for word in words]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert "Traceback" not in result.output
    assert "a bug" not in result.output
    return result


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", name="run")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"))


def make_run(folder: Path) -> Path:
    """A run of two updates on text of lower-case letters."""
    (folder / "text.txt").write_text(re.sub(r"[^a-z \n]", "", prose(300).lower()))
    config = {
        "data": {"source": str(folder / "text.txt"), "cache_dir": str(folder / "cache")},
        "device": "cpu",
        "dtype": "float32",
        "tokenizer": {"kind": "char"},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
        "optim": {"warmup_steps": 0},
        "train": {"max_steps": 2, "batch_size": 2, "eval_batches": 1, "threads": 1},
        "sample": {"max_new_tokens": 3},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    result = invoke("train", "-c", str(folder / "tiny.yaml"), "--out-dir", str(folder / "run"))
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_line(
    case: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lay_out(case)
    words, folders = command_line(case), [tmp_path]
    if any("{run}" in word for word in words):
        folders.append(request.getfixturevalue("run"))
        words = [word.replace("{run}", str(folders[-1])) for word in words]
    before = [everything(folder) for folder in folders]
    result = invoke(*words)
    code = case.get("code", 2)
    assert result.exit_code == code, result.output[:2000]
    for stream in ("stdout", "stderr"):
        for pattern in case.get(stream, []):
            assert re.search(pattern, getattr(result, stream), re.MULTILINE), result.output[:2000]
    lines = case.get("lines", 1 if code else 0)
    if lines is not None:
        assert len(result.stderr.splitlines()) == lines, result.stderr[:2000]
    made = set().union(*(everything(f) - b for f, b in zip(folders, before, strict=True)))
    if words[:1] in (["prepare"], ["plan"], ["train"]):
        made = {name for name in made if name.split("/")[0] != "data"}  # the cache
    assert not made


def test_every_row_of_the_corpus_has_a_case() -> None:
    ids = [param.id for param in CASES]
    assert len(ids) == len(set(ids))
    covered = {name.split("-")[0] for name in ids} | WRITTEN_OUT
    assert not set(ROWS) - covered


# What is written out


def test_thousands_of_unknown_keys_are_told_one_by_one() -> None:
    Path("train.yaml").write_text(BASE + "".join(f"key_{i}: 1\n" for i in range(1000)))
    result = invoke("config", "check", "-c", "train.yaml")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1000


def test_a_config_error_needs_no_torch() -> None:
    Path("train.yaml").write_text(BASE + "optim:\n  lr: abc\n")
    code = (
        "import sys\nfrom gptlite.cli.main import app\n"
        "for command in ('train', 'prepare', 'plan'):\n"
        "    try: app([command, '--config', 'train.yaml'])\n"
        "    except SystemExit as error: assert error.code == 2\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train.yaml:6:7: optim.lr: expected a number") == 3
    assert everything(Path()) == {"train.yaml"}


BAD_TEXT: dict[str, tuple[str | None, str]] = {
    "missing.txt": (None, "data.source: missing.txt: No such file or directory"),
    "empty.txt": ("", "data.source: empty.txt: has no text (0 bytes)"),
    "broken.jsonl": ('{"text": "a"}\n{"text": "b"\n', "data.source: broken.jsonl:2: not JSON"),
    "other.jsonl": ('{"body": "a"}\n', "data.source: other.jsonl: 1 of 1 records have no field"),
    "other.csv": ("body,n\na,1\n", "data.source: other.csv: no column 'text' (data.text_field)"),
}
WITHOUT_TORCH = """
import json, sys
from gptlite.cli.main import app
for arguments in json.loads(sys.argv[1]):
    try: app(arguments)
    except SystemExit as error: assert error.code == 2, error.code
    assert not {"torch", "gptlite.runs.recipe"} & set(sys.modules), arguments
"""


def test_an_error_in_the_text_needs_no_torch() -> None:
    Path("train.yaml").write_text(BASE)
    commands = []
    for name, (text, _) in BAD_TEXT.items():
        if text is not None:
            Path(name).write_text(text)
        beside = ["--config", "train.yaml", "--set", f"data.source={name}"]
        commands += [["train", *beside], ["plan", *beside], ["train", "--data", name]]
    before = everything(Path())
    arguments = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for _, problem in BAD_TEXT.values():
        assert done.stderr.count(problem) == 3, done.stderr
    assert len(done.stderr.splitlines()) == 3 * len(BAD_TEXT)
    assert everything(Path()) == before


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("dropout.preset", "gtp2", "expected one of none, gpt2, .*got 'gtp2'; did you mean 'gpt2'"),
        ("tokenizer.kind", "BPE", "expected one of .*, got 'BPE'; did you mean 'bpe'"),
        ("optim.schedule", "cosin", "expected one of .*, got 'cosin'; did you mean 'cosine'"),
        ("train.micro_batch_size", "atuo", "expected a positive integer or auto, got 'atuo'; did"),
        ("train.eval_batches", "al", "expected a positive integer or all, got 'al'; did you mean"),
        ("dtype", "bf16", "expected one of .*, got 'bf16'; did you mean 'bfloat16'"),
        ("model.mlp", "xyz", "expected one of .*, got 'xyz'$"),
    ],
)
def test_a_misspelt_value_is_named_with_what_it_may_mean(
    quote: str, key: str, value: str, problem: str
) -> None:
    Path("train.yaml").write_text(BASE)
    result = invoke("config", "check", "-c", "train.yaml", "--set", f"{key}={quote}{value}{quote}")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.match(rf"--set {re.escape(key)}: {problem}", line), line


def test_a_run_outside_says_where_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    result = invoke("train", "-c", str(run / "config.yaml"), "--out-dir", "a/../é 😀")
    assert result.exit_code == 0, result.output
    assert f"report: {tmp_path / 'é 😀'}/report.html" in result.stderr


def test_the_second_run_in_a_folder_leaves(run: Path) -> None:
    with (run / ".lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        held.write("pid 123 on here")
        held.flush()
        result = invoke("train", "--resume", str(run))
    assert result.exit_code == 6
    (line,) = result.stderr.splitlines()
    assert "in use by pid 123 on here" in line


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def edit(**values: Any) -> Any:
    """Change a sealed file and seal it again, as who means harm can."""

    def change(path: Path) -> None:
        path.write_text(storage.seal({**storage.unseal(path.read_text()), **values}))

    return change


DAMAGE = {
    "cut": ("train.bin", lambda path: os.truncate(path, 100), "train.bin: has 100 bytes"),
    "odd": ("train.bin", lambda path: os.truncate(path, 101), "train.bin: has 101 bytes"),
    "empty": ("val.bin", lambda path: os.truncate(path, 0), "val.bin: has 0 bytes"),
    "gone": ("val.bin", Path.unlink, "val.bin: has 0 bytes"),
    "same size": ("train.bin", flip, r"train.bin: damaged \(sha256"),
    "meta cut": ("meta.json", lambda path: os.truncate(path, 50), "meta.json: not JSON"),
    "meta of bytes": ("meta.json", lambda path: path.write_bytes(b"\xff\x00"), "UTF-8 at byte 0"),
    "meta too deep": ("meta.json", lambda path: path.write_text("[" * 99_999), "not JSON"),
    "meta a list": ("meta.json", lambda path: path.write_text("[]"), "meta.json: has no sha256"),
    "meta without splits": ("meta.json", edit(splits={}), "meta.json: damaged"),
    "meta with text": ("meta.json", edit(vocab_size="x"), "meta.json: damaged"),
    "meta of wide ids": ("meta.json", edit(vocab_size=70_000), "meta.json: damaged"),
    "meta of no layout": ("meta.json", edit(layout=None), "meta.json: damaged"),
    "tokenizer too deep": (
        "tokenizer.json",
        lambda path: path.write_text("[" * 100_000),
        "not JSON",
    ),
    "meta edited": ("meta.json", flip, r"meta.json: (damaged \(sha256|not JSON)"),
    "no tokenizer": (
        *("tokenizer.json", lambda path: path.write_text(storage.seal({}))),
        "not a tokenizer",
    ),
    "another tokenizer": (
        *("tokenizer.json", edit(characters="xyz")),
        r"tokenizer.json: damaged \(sha256",
    ),
}


@pytest.mark.parametrize(("name", "harm", "why"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_token_files_say_what_to_do(name: str, harm: Any, why: str) -> None:
    Path("text.txt").write_text(prose(100))
    Path("train.yaml").write_text(BASE + "tokenizer:\n  kind: char\n")
    assert invoke("prepare", "-c", "train.yaml").exit_code == 0
    (folder,) = Path("data/cache/tokens").iterdir()
    harm(folder / name)
    result = invoke("prepare", "-c", "train.yaml")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert str(folder) in line
    assert re.search(why, line), line
    assert line.endswith("; delete the folder to make it anew")
    shutil.rmtree(folder)
    assert invoke("prepare", "-c", "train.yaml").exit_code == 0


def test_two_byte_ids_are_refused_for_a_vocabulary_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    large = tokenizers.BPETokenizer("tiktoken", "large", tokenizers.GPT2_PATTERN, ranks, 100_256)
    monkeypatch.setattr(prepare.tokenizers, "load_pretrained", lambda name: large)
    Path("ids").mkdir()
    for name in ("train", "val"):
        np.arange(101, dtype="<u2").tofile(Path("ids") / f"{name}.bin")
    Path("train.yaml").write_text("data: {source: ids}\n" + BASE.split("\n", 2)[2])
    result = invoke("prepare", "-c", "train.yaml", "--set", "tokenizer.kind=tiktoken")
    assert result.exit_code == 2
    assert "ids/train.bin: not a token file: 202 bytes, not a multiple of 4" in result.stderr


def test_ids_beyond_two_gibibytes_are_found() -> None:
    with Path("train.bin").open("wb") as file:
        file.seek(2**32 + 2)
        file.write(np.arange(1, 10, dtype="<u2").tobytes())
    layout = Stream(np.memmap("train.bin", "<u2", "r"), 8)
    batch = layout.windows(np.array([2**31 + 1]))
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_with_another_tokenizer_is_not_used(copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer.json"
    edit(characters=storage.unseal(path.read_text())["characters"][::-1])(path)
    for command in ("generate", "eval"):
        result = invoke(command, "--run", str(copied))
        assert result.exit_code == 3
        (line,) = result.stderr.splitlines()
        assert re.search("tokenizer: differs from the one of step-00000002", line)


def test_a_run_does_not_go_on_with_other_text(run: Path) -> None:
    Path("other.txt").write_text("not what it was trained on\n" * 50)
    result = invoke("train", "--resume", str(run), "--set", "data.source=other.txt")
    assert result.exit_code == 2
    assert "--resume: data: the text is not the one" in result.stderr


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cache without vocabularies, and a proxy that takes every connection and never answers."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "vocabularies"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # another test may have loaded gpt2
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("answers", [False, None], ids=["closed", "silent"])
@pytest.mark.parametrize("cached", [None, b"damaged"], ids=["missing", "damaged"])
def test_a_vocabulary_that_cannot_be_had_is_told_in_time(
    answers: bool | None, cached: bytes | None, no_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = no_network if answers is None else "http://127.0.0.1:9"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setattr(tokenizers, "DOWNLOAD_SECONDS", 0.3 if answers is None else 8.0)
    if cached is not None:
        Path("vocabularies").mkdir()
        for name in TIKTOKEN_NAMES:
            (Path("vocabularies") / name).write_bytes(cached)
    Path("text.txt").write_text(prose(100))
    Path("train.yaml").write_text(BASE)
    result = invoke("prepare", "-c", "train.yaml", "--set", "tokenizer.kind=tiktoken")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.search("tokenizer.name: the vocabulary of 'gpt2' .* TIKTOKEN_CACHE_DIR", line)

"""The README's table "to add": each edit is made in a copy, and the files that it names suffice."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
Edits = list[tuple[str, str, str]]
"""(file, what stands there, what stands there afterwards)."""

SITE: Edits = [
    (
        "config/dropout.py",
        '    "key": Kind(',
        '    "query": Kind("BHTD", "BHTD"),\n    "key": Kind(',
    ),
    (
        "config/dropout.py",
        "    key: Site = None\n",
        "    query: Site = None\n    key: Site = None\n",
    ),
    (
        "core/model.py",
        '        self.drop_key = site("key", layer)\n',
        '        self.drop_query = site("query", layer)\n'
        '        self.drop_key = site("key", layer)\n',
    ),
    (
        "core/model.py",
        "        z = self.drop_head(self.attend(q, k, v, scene), scene.keys)",
        "        q = self.drop_query(q, scene.keys)\n"
        "        z = self.drop_head(self.attend(q, k, v, scene), scene.keys)",
    ),
]
PRESET: Edits = [
    ("config/dropout.py", '    "none", "gpt2", "nanogpt"', '    "mine", "none", "gpt2", "nanogpt"'),
    (
        "config/dropout.py",
        '    "none": Preset(0.0, ()),\n',
        '    "none": Preset(0.0, ()),\n    "mine": Preset(0.3, ("final",)),\n',
    ),
]
SHAPE: Edits = [
    (
        "config/dropout.py",
        '"constant", "linear", "cosine"',
        '"half", "constant", "linear", "cosine"',
    ),
    (
        "core/dropout.py",
        '    if schedule.shape == "constant":\n',
        '    if schedule.shape == "half":\n        return 0.5\n'
        '    if schedule.shape == "constant":\n',
    ),
]
TOKENIZER: Edits = [
    ("config/run.py", 'Literal["byte", "char"', 'Literal["reversed", "byte", "char"'),
    ("config/run.py", '{"byte": 257,', '{"reversed": 257, "byte": 257,'),
    (
        "data/tokenizers.py",
        "class CharTokenizer(Decoder):",
        'class ReversedTokenizer(ByteTokenizer):\n    kind = "reversed"\n\n'
        "    def encode_array(self, text):\n"
        "        return 255 - super().encode_array(text)\n\n"
        "    def token_bytes(self, token):\n"
        '        return b"" if token == self.eot else bytes([255 - token])\n\n\n'
        "class CharTokenizer(Decoder):",
    ),
    (
        "data/tokenizers.py",
        '    "byte": ByteTokenizer.from_json,\n',
        '    "byte": ByteTokenizer.from_json,\n    "reversed": ReversedTokenizer.from_json,\n',
    ),
    (
        "data/tokenizers.py",
        '    if config.kind == "char":\n',
        '    if config.kind == "reversed":\n        return ReversedTokenizer(eot=eot)\n'
        '    if config.kind == "char":\n',
    ),
]
OPTIMIZER: Edits = [
    ("config/run.py", 'Literal["adamw", "muon"]', 'Literal["plain", "adamw", "muon"]'),
    (
        "core/optim.py",
        "OPTIMIZERS: dict",
        "def plain(groups, optim, dtype):\n"
        "    parameters = [p for group in groups.values() for p in group]\n"
        "    yield torch.optim.SGD(parameters, lr=optim.lr)\n\n\nOPTIMIZERS: dict",
    ),
    ("core/optim.py", '    "adamw": adamw,\n', '    "adamw": adamw,\n    "plain": plain,\n'),
    (
        "core/optim.py",
        "    Muon: (",
        "    torch.optim.SGD: (),\n    Muon: (",
    ),
]
SCHEDULE: Edits = [
    ("config/run.py", 'Literal["cosine", "linear"', 'Literal["tenth", "cosine", "linear"'),
    (
        "core/optim.py",
        '    if optim.schedule == "constant":\n',
        '    if optim.schedule == "tenth":\n        return optim.lr / 10\n'
        '    if optim.schedule == "constant":\n',
    ),
]
SINK: Edits = [
    ("config/run.py", 'Literal["tensorboard", "wandb"', 'Literal["json", "tensorboard", "wandb"'),
    (
        "runs/sinks.py",
        "SINKS: dict",
        "class Lines:\n    def __init__(self, info):\n"
        '        self.file = (info.directory / "lines").open("a")\n\n'
        "    def write(self, row):\n        print(len(row), file=self.file)\n\n"
        "    def close(self):\n        self.file.close()\n\n\nSINKS: dict",
    ),
    (
        "runs/sinks.py",
        '    "tensorboard": TensorBoard,\n',
        '    "tensorboard": TensorBoard,\n    "json": Lines,\n',
    ),
]
SUITE: Edits = [
    (
        "measure/suites.py",
        "SUITES: dict",
        'def count(of):\n    return {"rows": of.rows.n_swept}\n\n\nSUITES: dict',
    ),
    (
        "measure/suites.py",
        '    "loss": measure_loss,\n',
        '    "loss": measure_loss,\n    "count": count,\n',
    ),
]
KIND: Edits = [
    (
        "measure/units.py",
        "KINDS: dict",
        "def halves(model):\n    for layer, block in enumerate(blocks(model)):\n"
        "        yield UnitOutput(block.mlp, slice(layer, layer + 1), 0)\n\n\nKINDS: dict",
    ),
    ("measure/units.py", '    "head": heads,\n', '    "head": heads,\n    "mlp": halves,\n'),
]
COMMAND: Edits = [
    (
        "cli/main.py",
        "\n\ndef main() -> None:",
        '\n\n@app.command()\ndef hello() -> None:\n    """Say hello."""\n    print("hello")\n'
        "\n\ndef main() -> None:",
    ),
]
ROWS: dict[str, tuple[Edits, list[str]]] = {
    "a dropout site": (SITE, ["dropout.sites.query=0.5"]),
    "a preset": (PRESET, ["dropout.preset=mine"]),
    "a schedule of the rates": (SHAPE, ["dropout.schedule.shape=half"]),
    "a tokenizer": (TOKENIZER, ["tokenizer.kind=reversed"]),
    "an optimizer": (OPTIMIZER, ["optim.name=plain"]),
    "a schedule of the learning rate": (SCHEDULE, ["optim.schedule=tenth"]),
    "a place to log to": (SINK, ["log.sinks=[json]"]),
    "an evaluation": (SUITE, []),
    "a kind of unit to remove": (KIND, []),
    "a command": (COMMAND, []),
}
"""Of the table: the edit, and what a run then asks for."""


def test_the_table_names_the_files_of_each_edit() -> None:
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| (an? [^|]*?) \| ([^|]*) \|", text, re.MULTILINE))
    assert list(rows) == list(ROWS)
    for name, (edits, _) in ROWS.items():
        assert {file for file, *_ in edits} == set(re.findall(r"`(\w+/\w+\.py)`", rows[name])), name


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all edits made, beside a text and a config."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "gptlite", folder / "gptlite")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for edits, _ in ROWS.values():
        for file, before, after in edits:
            path = folder / "gptlite" / file
            source = path.read_text()
            assert source.count(before) == 1, (file, before)
            path.write_text(source.replace(before, after))
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 100)
    (folder / "run.yaml").write_text(
        "{device: cpu, dtype: float32, compile: false, attention: math, "
        "data: {source: text.txt, cache_dir: cache}, tokenizer: {kind: byte}, "
        "model: {n_layer: 1, n_head: 2, n_embd: 16, context_length: 16}, "
        "optim: {warmup_steps: 0}, train: {max_steps: 4, batch_size: 4, threads: 1}, "
        "sample: {max_new_tokens: 5}}\n"
    )
    return folder


def call(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gptlite", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "CC": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_everything_that_was_added_works_and_is_measured(extended: Path) -> None:
    values = [f"--set={value}" for _, values in ROWS.values() for value in values]
    told = call(extended, "train", "--config", "run.yaml", "--out-dir", "run", *values)
    assert "query 0.5" in told
    assert "final 0.3" in told
    assert (extended / "run" / "lines").read_text().strip()
    row = json.loads((extended / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["dropout/query"] == 0.25
    config = yaml.safe_load((extended / "run" / "config.yaml").read_text())
    assert row["lr"] == pytest.approx(config["optim"]["lr"] / 10)
    told = call(extended, "eval", "--run", "run", "--suite", "count,knockout", "--fast", "--full")
    assert "count:" in told
    assert "mlp" in told
    assert call(extended, "hello") == "hello\n"
    assert "reversed" in (extended / "run" / "tokenizer" / "tokenizer.json").read_text()

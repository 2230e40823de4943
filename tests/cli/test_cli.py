"""The commands as a user meets them, from a run to its text; mostly in process, some for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY, merged, prose
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from gptlite.cli.main import app
from gptlite.config.dropout import PRESETS
from gptlite.config.reader import dump, shipped_configs, validate
from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import parse
from gptlite.runs.origin import load_run


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result


def write_config(folder: Path, **sections: object) -> Path:
    (folder / "text.txt").write_text(prose())
    source = {"source": str(folder / "text.txt"), "cache_dir": str(folder / "cache")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged(merged(TINY, {"data": source}), dict(sections))))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, dropout={"preset": "gpt2", "rate": 0.2})
    call("train", "--config", str(config), "--out-dir", str(folder / "run"))
    return folder / "run"


def test_a_run_writes_what_the_design_lists(trained: Path) -> None:
    files = "config.yaml env.json plan.json metrics.jsonl train.log summary.json"
    assert all((trained / name).is_file() for name in files.split())
    assert (trained / "tokenizer" / "tokenizer.json").is_file()
    assert (trained / "samples" / "step-00000008.txt").read_text().strip()
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[3].keys() >= {
        *("step", "tokens", "epoch", "elapsed_seconds", "train/loss", "train/loss_dropout_off"),
        *("val/loss", "val/bits_per_byte", "lr", "grad_norm", "tokens_per_second"),
        *("dropout/embedding", "dropout/mlp_output"),
    }
    assert rows[-1]["tokens"] == 8 * 8 * 16
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["best"]["val_loss"] == min(row["val/loss"] for row in rows if "val/loss" in row)
    assert "dropout: 4 sites live" in (trained / "train.log").read_text()
    assert "dropout: off (verified)" in (trained / "train.log").read_text()


def test_the_saved_config_loads_to_the_same_values(trained: Path) -> None:
    run = load_run([str(trained / "config.yaml")])
    assert dump(run) == (trained / "config.yaml").read_text()
    assert "auto" not in {run.device, run.dtype, run.compile, run.attention}
    assert "auto" not in {run.train.micro_batch_size, run.train.early_stop, run.train.threads}


def test_a_resumed_run_equals_the_uninterrupted_one(trained: Path, tmp_path: Path) -> None:
    """Through the commands: weights, metrics and texts of 4 + 4 updates and of 8."""
    config = trained.parent / "tiny.yaml"
    half, rest = tmp_path / "half", ["--config", str(config), "--out-dir"]
    script = (
        "from gptlite.runs import session\nold = session.Session.train\n"
        "def train(self):\n"
        "    made = self.trainer.updates\n"
        "    self.trainer.updates = lambda: made(4)\n"
        "    old(self)\n    self.save()\n    raise KeyboardInterrupt\n"
        "session.Session.train = train\n"
        "from gptlite.cli.main import app\n"
        f"app(['train', *{rest!r}, {str(half)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    call("train", *rest, str(half), "--resume", "auto")
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = "checkpoints/step-00000008"
        assert (half / last / name).read_bytes() == (trained / last / name).read_bytes()
    timeless = []
    for run in (half, trained):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clocks = ("elapsed_seconds", "tokens_per_second")
        timeless.append([{k: v for k, v in row.items() if k not in clocks} for row in rows])
    assert timeless[0] == timeless[1]
    assert (half / "samples/step-00000008.txt").read_text() == (
        trained / "samples/step-00000008.txt"
    ).read_text()


def test_a_finished_run_can_be_resumed_to_more_steps(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    call("train", "--resume", str(copy))
    call("train", "--resume", str(copy), "--set", "train.max_steps=10")
    assert json.loads((copy / "summary.json").read_text())["steps"] == 10


def test_a_resume_that_would_be_another_run_lists_every_change(trained: Path) -> None:
    changes = ["--set", "seed=1", "--set", "dropout.rate=0.3", "--set", "optim.lr=0.5"]
    result = call("train", "--resume", str(trained), *changes, code=2)
    for line in ("seed: 1337 -> 1", "dropout.rate: 0.2 -> 0.3", "optim.lr: 0.001 -> 0.5"):
        assert line in result.stderr


def test_a_run_never_overwrites_another(trained: Path) -> None:
    config = str(trained.parent / "tiny.yaml")
    before = (trained / "metrics.jsonl").read_bytes()
    result = call("train", "--config", config, "--out-dir", str(trained), code=2)
    assert "contains a run; use --resume auto or another --out-dir" in result.stderr
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_runs_without_a_directory_get_numbered_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, train={"max_steps": 2}, optim={"warmup_steps": 0})
    monkeypatch.chdir(tmp_path)
    call("train", "--config", str(config))
    call("train", "--config", str(config))
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny", "tiny-2"]
    call("train", "--config", str(config), "--resume", "auto", "--set", "train.max_steps=3")
    assert json.loads(Path("runs/tiny-2/summary.json").read_text())["steps"] == 3
    assert json.loads(call("generate", "--json").stdout)["run"] == "runs/tiny-2"


def test_two_runs_in_one_directory_are_one_too_many(trained: Path) -> None:
    from gptlite.runs.directory import hold_directory

    with hold_directory(trained):
        result = call("train", "--resume", str(trained), code=6)
    assert f"in use by pid {os.getpid()}" in result.stderr


def test_generation_continues_a_prompt(trained: Path) -> None:
    short = ["generate", "--run", str(trained), "--max-new-tokens", "5"]
    streamed = call(*short, "--prompt", "The ").stdout
    assert streamed.startswith("The ")
    assert len(streamed) == len("The ") + 5 + 1
    document = json.loads(call(*short, "--prompt", "The ", "--json").stdout)
    assert streamed == "The " + document["results"][0]["text"] + "\n"
    again = call(*short, "--prompt", "The ", "--seed", "5").stdout
    assert again != streamed


def test_generation_takes_batches_and_samples(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("of the")
    result = call(
        *("generate", "--run", str(trained), "--prompt", "a", "--num-samples", "2"),
        *("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "4", "--json"),
    )
    results = json.loads(result.stdout)["results"]
    assert [(r["prompt"], r["sample"]) for r in results] == [
        *(("a", 0), ("a", 1), ("of the", 0), ("of the", 1))
    ]
    assert all(r["tokens"] == 4 and r["finished"] == "length" for r in results)


def test_eval_measures_every_split_and_writes_it_down(trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    best = min(row["val/loss"] for row in rows if "val/loss" in row)
    document = json.loads(call("eval", "--run", str(trained), "--json").stdout)
    assert document["loss"]["loss"] == pytest.approx(best, rel=1e-6)
    saved = trained / "eval" / "loss-val-step-00000008.json"
    assert json.loads(saved.read_text())["loss"] == document["loss"]["loss"]
    (tmp_path / "other.txt").write_text(prose(400, seed=3))
    for split in ("train", str(tmp_path / "other.txt")):
        other = json.loads(call("eval", "--run", str(trained), "--split", split, "--json").stdout)
        assert 0 < other["loss"]["loss"] < 5
    on = call("eval", "--run", str(trained), "--dropout-active", "--json").stdout
    assert json.loads(on)["loss"]["loss"] != document["loss"]["loss"]
    assert "perplexity" in call("eval", "--run", str(trained)).stdout


def test_plan_says_what_would_happen_and_does_nothing(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, dropout={"preset": "gpt2", "rate": 0.2}))
    document = json.loads(call("plan", "--config", config, "--json").stdout)
    assert document["steps"] == 8
    run, vocab_size = load_run([config]), document["vocab_size"]
    assert document["parameters"] == run.model.n_parameters(vocab_size)
    sites = {site["site"]: site for site in document["dropout"]}
    assert sites["attention_weights"]["shape"] == [8, 2, 16, 16]
    assert (sites["mlp_output"]["modules"], sites["embedding"]["modules"]) == (2, 1)
    assert document["seconds_per_update"] > 0
    assert document["config"]["dtype"] == "float32"
    assert "attention_context" in call("plan", "--config", config).stdout
    assert not (tmp_path / "runs").exists()


def test_prepare_makes_the_files_that_training_uses(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    document = json.loads(call("prepare", "--config", config, "--json").stdout)
    folder = Path(document["folder"])
    before = (folder / "train.bin").stat().st_mtime_ns
    assert "tokens" in call("prepare", "--config", config).stdout
    call("train", "--config", config, "--out-dir", str(tmp_path / "run"))
    assert (folder / "train.bin").stat().st_mtime_ns == before


def test_config_show_says_where_each_value_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  source: x.txt\ntrain:\n  max_steps: 5\noptim:\n  warmup_steps: 1\n")
    over = tmp_path / "b.yaml"
    over.write_text("optim: {lr: 3e-4}\n")
    arguments = ["--config", str(path), "--config", str(over), "--set", "seed=7", "--json"]
    shown = json.loads(call("config", "show", *arguments).stdout)
    assert shown["optim.lr"] == {"value": 0.0003, "origin": f"{over}:1:13"}
    assert shown["train.max_steps"] == {"value": 5, "origin": f"{path}:4:14"}
    assert shown["seed"] == {"value": 7, "origin": "--set seed"}
    assert shown["model.n_layer"]["origin"] == "default"
    assert "seed: 7" in call("config", "show", *arguments[:-1]).stdout


def test_config_list_describes_what_is_shipped() -> None:
    """From the comments that the files begin with, studies under a heading of their own."""
    rows = json.loads(call("config", "list", "--json").stdout)
    kinds = ("config", "study")
    names = {kind: {row["name"] for row in rows if row["kind"] == kind} for kind in kinds}
    assert names["config"] == {path.stem for path in shipped_configs().glob("*.yaml")}
    assert names["study"] == {path.stem for path in (shipped_configs() / "studies").glob("*.yaml")}
    text = call("config", "list").stdout
    assert all(len(line) <= 80 or "/" in line for line in text.splitlines())
    parts = text.split("\nstudies, as in: gptlite study ")
    of_kind = dict(zip(kinds, (" ".join(part.split()) for part in parts), strict=True))
    for row in rows:
        assert f"{row['name']} {row['description']}" in of_kind[row["kind"]]
        assert Path(row["path"]).read_text().startswith(f"# {row['description'][:40]}")


def test_later_layers_replace_what_excludes_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    digest = "0" * 64
    path.write_text(f"data: {{source: x.txt, sha256: '{digest}'}}\ntrain: {{max_steps: 500}}\n")
    run = load_run([str(path)], ["train.epochs=3", "data.source=mine.txt"])
    assert (run.train.max_steps, run.train.epochs, run.data.sha256) == (None, 3.0, None)


@pytest.mark.parametrize("path", sorted(shipped_configs().glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_say_what_they_are_for(path: Path) -> None:
    run = load_run([path.stem])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert validate(parse(dump(run), "dumped")) == run


WORDS_OF_YAML = (
    "yes no On off y N true False null ~ 017 0x1F 3e-4 1e3 .5 1_000 1:30 -1 .inf .NaN - ="
)


@pytest.mark.parametrize("word", [*WORDS_OF_YAML.split(), "", " a", "2026-01-01", "a: b", "a #b"])
def test_text_that_some_yaml_reads_as_something_else_is_dumped_in_quotes(word: str) -> None:
    """A file named 1e3, a prompt that says yes: as they were, for readers of YAML 1.1 and 1.2."""
    source = {"data": {"source": word or "x"}, "train": {"max_steps": 300}}
    run = RunConfig.model_validate({**source, "sample": {"prompts": [word]}})
    text = dump(run)
    assert text.count(f'"{word}"') == (2 if word else 1)
    assert validate(parse(text, "dumped")) == run
    assert yaml.safe_load(text)["sample"]["prompts"] == [word]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    source=TEXTS.filter(lambda s: "://" not in s),
    lr=st.floats(1e-8, 10),
    rate=st.one_of(st.just(0.0), st.floats(1e-5, 0.99)),
    preset=st.sampled_from(sorted(set(PRESETS) - {"none"})),
    seed=st.integers(0, 2**63 - 1),
    prompts=st.lists(TEXTS, max_size=3),
)
def test_any_config_loads_again_to_the_same_values(
    source: str, lr: float, rate: float, preset: str, seed: int, prompts: list[str]
) -> None:
    run = RunConfig.model_validate(
        {
            "seed": seed,
            "data": {"source": source},
            "optim": {"lr": lr, "min_lr": 0.0, "warmup_steps": 0},
            "dropout": {"preset": preset, "rate": rate, "sites": {"mlp_output": rate}},
            "train": {"max_steps": 3},
            "sample": {"prompts": prompts},
        }
    )
    assert validate(parse(dump(run), "dumped")) == run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    config = write_config(tmp_path, train={"max_steps": 1_000_000, "eval_interval": 900_000})
    run = tmp_path / "run"
    command = [sys.executable, "-m", "gptlite", "train", "--config", str(config)]
    with subprocess.Popen(
        [*command, "--out-dir", str(run)], stderr=subprocess.PIPE, text=True
    ) as process:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"saved; go on with: gptlite train --resume {run}" in errors
    assert "Traceback" not in errors
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    saved = (run / "checkpoints" / "last").read_text().strip()
    assert int(saved.removeprefix("step-")) >= last

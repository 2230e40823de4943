"""Every suite on a small run, through the command."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EVERYWHERE, Workshop, prose
from typer.testing import CliRunner

from gptlite.cli import evaluate as evaluate_command
from gptlite.cli.main import app
from gptlite.core.model import GPT
from gptlite.data.prepare import open_split, prepare
from gptlite.errors import ConfigError, DivergedError
from gptlite.machine import count_cores
from gptlite.measure import suites
from gptlite.measure.suites import SUITES, Effort, Measurement, label
from gptlite.report import figures
from gptlite.runs.results import read_evals
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

SMALL = Effort(64, 32, 32, (0, 0.5, 1), 2, (1, 3))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workshop = Workshop(tmp_path_factory.mktemp("suites"))
    dropout = EVERYWHERE.model_dump(mode="json")
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16}
    directory = workshop.folder / "run"
    train(workshop.run(dropout=dropout, model=model), directory)
    return directory


def call(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_all_suites_are_measured_and_written_down(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "FAST", SMALL)
    out = json.loads(call("--run", str(run_dir), "--suite", "all", "--fast", "--json").stdout)
    assert set(SUITES) < set(out)
    for name in SUITES:
        saved = json.loads((run_dir / "eval" / f"{name}-val-step-00000008.json").read_text())
        assert saved == {**{key: out[key] for key in ("run", "step", "split")}, **out[name]}
    assert all(math.isfinite(number) for number in numbers(out))
    curves = out["knockout"]["kinds"]
    assert (
        set(curves) == set(out["importance"]["kinds"]) == {"head", "neuron", "layer", "dimension"}
    )
    for kind in curves.values():
        for ablation in ("zero", "mean"):
            orders = kind[ablation]
            assert set(orders) == {"random", "most_first", "least_first"}
            assert all(order["loss"][0] == out["knockout"]["loss"] for order in orders.values())
            assert len({order["loss"][-1] for order in orders.values()}) == 1
    assert len(out["loss"]["loss_by_position"]) == 16
    gap = out["loss"]["loss"] - out["loss"]["train_loss"]
    assert out["loss"]["generalisation_gap"] == pytest.approx(gap)
    assert out["mc-dropout"]["passes"] == [1, 3]


def test_measuring_again_gives_the_same_numbers(run_dir: Path) -> None:
    trained = load_trained(run_dir, "best")

    def once() -> Any:
        arguments = (trained, "val", ["all"], lambda: prepare(trained.run))
        return suites.run_suites(*arguments, effort=SMALL)

    assert once() == once()


def opened(run_dir: Path, split: str) -> Any:
    """The token files that a source is measured on."""
    trained = load_trained(run_dir, "best")
    return open_split(trained.run, trained.tokenizer, split)


def test_a_text_file_of_one_row_can_be_measured(run_dir: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "one.txt")
    Path(path).write_text("the of and")
    trained, files = load_trained(run_dir, "best"), opened(run_dir, path)
    found = suites.run_suites(trained, path, SUITES, lambda: files, effort=SMALL)
    assert found["knockout"]["targets"] == 9
    assert found["calibration"]["ece"]["reason"] == "the text has only one row"
    assert found["loss"]["loss_standard_error"] is None
    assert found["mc-dropout"]["averaged_loss"]["low"] is None
    for draw in (figures.draw_calibration, figures.knockouts, figures.importances, figures.passes):
        assert list(draw(SimpleNamespace(evals=found)))  # type: ignore[arg-type]


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    """These documents as one source."""
    path = folder / f"texts{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == ".csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet", reason="the extra `data`")
        from pyarrow import table

        pyarrow.write_table(table({"text": texts}), path)
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(text)
    return path / "*.txt" if kind == " glob" else path


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", " folder", " glob"])
def test_a_source_is_measured_on_the_tokens_that_validation_has(
    workshop: Workshop, kind: str, layout: str
) -> None:
    """With the same separators between its documents, whatever file they are in."""
    texts = [f"document {i} of ten." for i in range(10)]
    data = {"source": str(write_as(".jsonl", workshop.folder, texts)), "layout": layout}
    run = workshop.run(data={**data, "split_by": "tail", "val_fraction": 0.5})
    own = prepare(run)
    (workshop.folder / "other").mkdir()
    source = write_as(kind, workshop.folder / "other", texts[5:])
    files = open_split(run, own.tokenizer, str(source))
    assert files.tokens("val").tolist() == own.tokens("val").tolist()
    assert files.tokens("val").tolist().count(own.tokenizer.eot) == 5 + (layout == "documents")
    assert open_split(run, own.tokenizer, str(source)).folder == files.folder


def test_fast_measures_the_loss_on_some_rows_and_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "FAST", SMALL._replace(loss_rows=5))
    whole = json.loads(call("--run", str(run_dir), "--json").stdout)["loss"]
    fast = json.loads(call("--run", str(run_dir), "--fast", "--json").stdout)["loss"]
    assert (fast["rows"], fast["targets"]) == (5, 5 * 16)
    assert "rows" not in whole
    assert fast["rows_of_split"] == -(-whole["targets"] // 16)


def test_results_of_every_source_have_a_file_of_their_own(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one name, files called val and val.txt, names as long as a system allows."""
    monkeypatch.chdir(tmp_path)
    names = ["a/text.txt", "b/text.txt", "b/val", "./val", "train.txt", f"{'é' * 125}.txt"]
    names += ["loss-val-step-00000008.json", "*.md", "new\nline\udcff.txt"]
    before = json.loads(call("--run", str(run_dir), "--json").stdout)
    written = {label(name) for name in names}
    assert len(written) == len(names)
    for number, name in enumerate(names):
        suites.save_results(run_dir, name, 8, {"loss": {"bytes": number}}, active=False)
    found = [json.loads(path.read_text()) for path in (run_dir / "eval").glob("loss-*-step-*")]
    assert set(range(len(names))) <= {each["bytes"] for each in found}
    assert read_evals(run_dir / "eval", [])["loss"]["loss"] == before["loss"]["loss"]
    assert label("b/../a/text.txt") == label(str(tmp_path / "a/text.txt"))


def test_results_are_saved_though_they_cannot_be_printed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = run_dir / "eval" / "loss-train-step-00000008.json"

    def refuse(*_: object) -> None:
        assert saved.is_file()
        raise RuntimeError

    monkeypatch.setattr(evaluate_command, "print_sentences", refuse)
    CliRunner().invoke(app, ["eval", "--run", str(run_dir), "--split", "train"])
    assert saved.is_file()


def test_a_terminal_that_lacks_a_character_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words. " * 20)
    (tmp_path / "run.yaml").write_text("data: {source: text.txt}\ntrain: {max_steps: 500}\n")
    cache = ["--set", "data.cache_dir=漢é", "--set", "tokenizer.kind=byte"]
    for encoding, shown in (("ascii", r"\u6f22\xe9"), ("latin-1", "\\u6f22\xe9")):
        done = subprocess.run(
            [sys.executable, "-m", "gptlite", "prepare", "-c", "run.yaml", *cache],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout.decode(encoding)


def test_the_rows_that_rank_units_are_not_those_they_are_measured_on(run_dir: Path) -> None:
    trained = load_trained(run_dir, "best")
    of = Measurement(trained, "val", lambda: prepare(trained.run))
    ranked = {tuple(row) for row in of.spread_rows(64, 1).inputs.tolist()}
    measured = {tuple(row) for row in of.spread_rows(64, 0).inputs.tolist()}
    assert len(ranked) == len(measured) == 6
    assert not ranked & measured


def test_single_units_are_measured_in_float32_whatever_the_run(run_dir: Path) -> None:
    """What one neuron does to the loss is less than bfloat16 rounds away."""
    trained = load_trained(run_dir, "best")
    half = replace(trained, run=trained.run.model_copy(update={"dtype": "bfloat16"}))
    of = Measurement(half, "val", lambda: prepare(half.run), effort=SMALL)
    assert (of.ranking("head").run.dtype, of.subject.run.dtype) == ("float32", "bfloat16")


def test_results_are_printed_with_their_intervals(run_dir: Path) -> None:
    lines = call("--run", str(run_dir), "--suite", "calibration,loss", "--full").stdout.splitlines()
    assert lines[0].endswith("step 8, val:")
    (ece,) = (line.split() for line in lines if line.startswith("  ece "))
    value, low, high = (float(word.strip("[],")) for word in ece[1:])
    assert low <= value <= high
    assert any(line.startswith("  perplexity ") for line in lines)


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="no suite 'losss'; there are: loss, calib.*, all; did you mean 'loss'"
    ):
        suites.choose_suites(["losss"])


def test_only_the_loss_can_be_measured_with_dropout_on() -> None:
    with pytest.raises(ConfigError, match="--dropout-active"):
        suites.run_suites(
            None,  # type: ignore[arg-type]
            "val",
            ["all"],
            lambda: None,  # type: ignore[arg-type, return-value]
            dropout_active=True,
        )


def test_a_model_without_dropout_says_so(workshop: Workshop) -> None:
    train(workshop.run(dropout={"preset": "none"}), workshop.folder / "run")
    trained = load_trained(workshop.folder / "run", "best")
    found = suites.run_suites(trained, "val", ["mc-dropout"], lambda: workshop.files())
    assert "no dropout" in found["mc-dropout"]["note"]


def outside(value: Any, place: str = "") -> list[str]:
    """Where a number does not lie in its own interval, in results of suites."""
    if isinstance(value, list):
        return [name for i, part in enumerate(value) for name in outside(part, f"{place}[{i}]")]
    if not isinstance(value, dict):
        return []
    found = [name for key, part in value.items() for name in outside(part, f"{place}.{key}")]
    curve = isinstance(value.get("low"), list)
    if curve or set(value) == {"value", "low", "high"}:
        each = zip(value["low"], value["loss"], value["high"], strict=True) if curve else ()
        for low, point, high in each or [(value["low"], value["value"], value["high"])]:
            top = math.inf if high is None else high
            if None not in (low, point) and not low <= point <= top:
                found.append(f"{place} {point} [{low}, {high}]")
    return found


@pytest.mark.parametrize(("scale", "seed"), [(0, 0), (0.02, 0), (0.02, 1), (1, 0)])
def test_no_number_lies_outside_of_its_interval(
    run_dir: Path, scale: float, seed: int, tmp_path: Path
) -> None:
    """Of a model that has learned a little, and of one whose units matter by chance alone."""
    trained = load_trained(run_dir, "best")
    if scale:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in trained.model.parameters():
                parameter.normal_(0, scale)
    path = tmp_path / "rows.txt"
    path.write_text(prose(60, seed=seed))
    files = opened(run_dir, str(path))
    suite = ["loss", "calibration", "knockout", "importance", "mc-dropout"]
    effort = Effort(120, 120, 120, (0, 0.2, 0.5, 1), 6, (1, 3))
    found = suites.run_suites(trained, str(path), suite, lambda: files, effort=effort)
    assert outside(found) == []
    assert len(numbers(found)) > 200


@pytest.mark.parametrize("suite", SUITES)
def test_a_model_that_gives_nan_ends_every_suite_with_its_step(run_dir: Path, suite: str) -> None:
    trained = load_trained(run_dir, "best")
    with torch.no_grad():
        trained.model.norm.weight.fill_(1e38)
        trained.model.norm.bias.fill_(-1e38)
    with pytest.raises(DivergedError, match=f"^step {trained.state.step}: .*(not finite|nan|inf)"):
        suites.run_suites(trained, "val", [suite], lambda: prepare(trained.run), effort=SMALL)


def test_measuring_and_generating_keep_to_the_threads_of_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of this run is one, whatever torch would take by itself."""
    monkeypatch.setattr(suites, "FAST", SMALL)
    seen: set[int] = set()
    features = GPT.features

    def watched(self: GPT, *args: Any, **more: Any) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return features(self, *args, **more)

    monkeypatch.setattr(GPT, "features", watched)
    for command in (["eval", "--suite", "all", "--fast"], ["generate", "--max-new-tokens", "2"]):
        torch.set_num_threads(2)
        result = CliRunner().invoke(app, [command[0], "--run", str(run_dir), *command[1:]])
        assert result.exit_code == 0, result.output
        assert seen == {1}
        seen.clear()


OTHER_THREADS = """
import os, types
import numpy as np
import torch
from gptlite.measure import calibration; from gptlite.measure import importance
torch.set_num_threads(1)

def seconds(): # of each thread of this process
    found = {}
    for task in os.listdir("/proc/self/task"):
        words = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
        found[int(task)] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return found

before, rng = seconds(), np.random.default_rng(0)
subject = types.SimpleNamespace(base=np.zeros(64), n_targets=np.full(64, 9.0))
for _ in range(20):
    importance.importance(subject, rng.standard_normal((4096, 64)), 1)
spent = {task: s - before.get(task, 0) for task, s in seconds().items()}
print(sum(s for task, s in spent.items() if task != os.getpid()), spent[os.getpid()])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted by Linux")
@pytest.mark.skipif(count_cores() < 2, reason="one core has no second thread")
def test_no_product_takes_more_threads_than_the_run() -> None:
    """Numpy's would take every core, so that the workers of a study got into each other's way."""
    done = subprocess.run([sys.executable, "-c", OTHER_THREADS], capture_output=True, text=True)
    others, own = map(float, done.stdout.split())
    assert others < 0.05 * own, done.stderr


@pytest.mark.parametrize("more", [[], ["--json"], ["--temperature", "0"]])
def test_a_model_that_gives_nan_generates_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """The likeliest of tokens that are all NaN would be some token."""
    features = GPT.features
    monkeypatch.setattr(GPT, "features", lambda *args, **more: features(*args, **more) * math.nan)
    result = CliRunner().invoke(app, ["generate", "--run", str(run_dir), *more])
    assert result.exit_code == 4
    assert "step 8: the model's logits are not finite" in result.stderr

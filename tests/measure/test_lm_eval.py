"""The evaluation harness gives the same numbers on a run and on what the run is exported as."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Workshop
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.runs.export import prepare_hf, save
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

TASKS = {
    "mine_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "mine_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "mine_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "mine_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "do_sample": False, "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_tasks(folder: Path) -> Path:
    words = WORDS.split()
    rows = [
        {
            "question": " ".join(words[i % 7 : i % 7 + 2 + i % 25]),
            "choices": [words[i % 20], words[(i + 7) % 20] + " " + words[i % 3]],
            "answer": i % 2,
            "text": " ".join(words * (1 + i % 3)),
        }
        for i in range(24)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(data)}}
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
        }
        path = folder / "tasks" / f"{name}.yaml"
        path.write_text(json.dumps({**whole, **task}))
    return folder / "tasks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_a_run_and_its_export_get_the_same_numbers(workshop: Workshop, kind: str) -> None:
    pytest.importorskip("accelerate", reason="the harness needs it for Hugging Face's models")
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = {"kind": kind, "vocab_size": 300} if kind == "bpe" else {"kind": kind}
    folder = workshop.folder / "two"
    folder.mkdir()
    for name in "ab":  # two documents, so that there is an end of text
        (folder / f"{name}.txt").write_text(workshop.text.read_text())
    # All examples fit: past the context the harness reuses answers of other examples.
    model = {"context_length": 192}
    run = workshop.run(data={"source": str(folder)}, tokenizer=tokenizer, model=model)
    train(run, workshop.folder / "run")
    tasks = write_tasks(workshop.folder)
    asked = ["--tasks", ",".join(TASKS), "--include-path", str(tasks), "--json"]
    command = ["eval", "--run", str(workshop.folder / "run"), "--suite", "lm-eval"]
    result = CliRunner().invoke(app, [*command, *asked])
    assert result.exit_code == 0, result.output
    ours = json.loads(result.stdout)["lm-eval"]
    save(prepare_hf(load_trained(workshop.folder / "run", "best")), workshop.folder / "hf")
    theirs: dict[str, Any] = evaluator.simple_evaluate(
        HFLM(pretrained=str(workshop.folder / "hf"), device="cpu", dtype="float32", batch_size=4),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=False,
    )["results"]
    for task in TASKS:
        for name, value in theirs[task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert ours[task][name.removesuffix(",none")] == pytest.approx(value, rel=1e-4)
    assert len(list((workshop.folder / "run" / "eval").glob("lm-eval-*.json"))) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "--tasks: required for --suite lm-eval"),
        (["--tasks", "nonsense"], "--tasks: the harness has no nonsense"),
        (["--tasks", "x", "--include-path", "nowhere"], "--include-path nowhere: no such dir"),
        (["--tasks", "lambada_openai"], "--tasks lambada_openai: "),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    workshop: Workshop, asked: list[str], told: str
) -> None:
    train(workshop.run(tokenizer={"kind": "byte"}), workshop.folder / "run")
    run = ["eval", "--run", str(workshop.folder / "run"), "--suite", "lm-eval"]
    result = CliRunner().invoke(app, [*run, *asked])
    assert result.exit_code in (1, 2), result.output
    assert told in result.stderr
    assert "Traceback" not in result.output

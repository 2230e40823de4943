"""What `gptlite plan` says about time; what it says about dropout is in test_audit.py."""

from dataclasses import replace

import pytest
from conftest import Workshop

from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.data.token_files import TokenFiles
from gptlite.planning import plan as planning
from gptlite.planning.plan import make_plan, plan_run, plan_table
from gptlite.planning.rehearsal import EvaluationPace, Pace
from gptlite.terminal import format_duration


@pytest.fixture(autouse=True)
def _paces(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_updates(trainer: Trainer) -> Pace:
        return Pace(2.0, 4)

    def time_evaluation(trainer: Trainer, files: TokenFiles) -> EvaluationPace:
        return EvaluationPace(1.0, 64)

    monkeypatch.setattr(planning, "time_updates", time_updates)
    monkeypatch.setattr(planning, "time_evaluation", time_evaluation)


@pytest.mark.parametrize(("eval_interval", "count"), [(4, 2), (3, 3), (8, 1), (100, 1)])
def test_the_time_is_that_of_updates_and_evaluations(
    workshop: Workshop, eval_interval: int, count: int
) -> None:
    run = workshop.run(train={"eval_interval": eval_interval, "eval_batches": 1})
    planned = plan_run(run)
    passes = 1 + 1 + 4 + 1  # of validation text; of 256 rows of training text; each checked once
    assert planned.plan["evaluations"] == count
    assert planned.plan["seconds_per_evaluation"] == passes
    line = next(one for one in plan_table(planned.run, planned.plan) if one.startswith("time: "))
    assert line.startswith(
        f"time: {format_duration(8 * 2.0 + count * passes)}: 8 updates of 2 s and "
    )
    assert line.endswith("(measured on 4 of 8)")


def test_of_several_processes_the_time_is_that_of_each(workshop: Workshop) -> None:
    run = workshop.run(dropout={"preset": "gpt2", "rate": 0.1})
    alone, four = (plan_run(run, size).plan for size in (1, 4))
    assert four["seconds_per_evaluation"] == alone["seconds_per_evaluation"] / 4
    assert four["seconds_per_update"] == 2.0


def test_a_compiled_run_is_counted_with_all_its_logits(workshop: Workshop) -> None:
    """torch.compile makes them whole, where the plain loss goes through them in parts."""
    run = workshop.run(
        compile=False, attention="math", train={"batch_size": 64, "micro_batch_size": 64}
    )
    resolved, rows = plan_run(run).run, workshop.files().rows("train", 16)
    files = workshop.files()
    large = replace(files, meta={**files.meta, "vocab_size": 10**6})

    def estimate(run: RunConfig) -> int:
        return int(make_plan(run, GPT.of_run(run, 50), large, rows, {})["memory_bytes_estimate"])

    compiled = resolved.model_copy(update={"compile": True})
    whole = 64 * 16 * 10**6 * (4 + 4 + 2)
    assert estimate(resolved) < whole / 4
    assert estimate(compiled) - estimate(resolved) > 0.9 * whole


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({}, "as GPT-2 and as GGUF"),
        ({"position": "rope"}, "as StarCoder2 and as GGUF"),
        ({"mlp": "relu2"}, "as GPT-2, not as GGUF (model.mlp relu2, not gelu)"),
        (
            {"position": "rope", "norm": "rmsnorm", "mlp": "relu2"},
            "as Arcee, not as GGUF (model.bias true, not false)",
        ),
        (
            {"norm": "rmsnorm"},
            "none to Hugging Face (GPT-2 comes nearest: model.norm rmsnorm, not layernorm)",
        ),
    ],
)
def test_it_says_before_training_what_a_model_will_be(
    workshop: Workshop, model: dict[str, object], told: str
) -> None:
    planned = plan_run(workshop.run(model=model))
    (line,) = (one for one in plan_table(planned.run, planned.plan) if one.startswith("export: "))
    assert line == f"export: {told}"

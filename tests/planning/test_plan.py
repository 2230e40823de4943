"""What `gptlite plan` says about time; what it says about dropout is in test_audit.py."""

from dataclasses import replace

import pytest
from conftest import Workshop

from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.data.token_files import TokenFiles
from gptlite.planning import plan as planning
from gptlite.planning.plan import make_plan, plan_run, plan_table, site_table
from gptlite.planning.rehearsal import EvaluationPace, Pace
from gptlite.terminal import fold, format_duration

PLANNED = """\
dropout site       rate  values  ms/update  share  masks
embedding           0.1    4.1k       2.00   0.1%  keyed
  1 x drop_embedding: 4x16x32
attention_weights   0.1   8.19k       2.00   0.1%  keyed
  2 x blocks.*.attention.drop_weights: 4x2x16x16
head               0.05   8.19k       2.00   0.1%  keyed
  2 x blocks.*.attention.drop_head: 4x2x16x16, mask 4x2x1x1
attention_context   0.2   8.19k       2.00   0.1%  keyed
  2 x blocks.*.attention.drop_context: 4x16x32, mask 4x1x32
attention_output    0.1   8.19k       2.00   0.1%  keyed
  2 x blocks.*.attention.drop_output: 4x16x32
mlp_output          0.1   8.19k       2.00   0.1%  keyed
  2 x blocks.*.mlp.drop_output: 4x16x32
layer               0.2   8.19k       2.00   0.1%  keyed
  2 x blocks.*.drop_layer: 4x16x32, mask 4x1x1, rate by layer 0.1 0.2, what
    stays is not scaled
cost: forward and backward of the site alone, measured here
rate 0: token, key, mlp_activation, final

attention: math: asked for
time: 0:32: 8 updates of 2 s and 2 evaluations of 8 s (measured on 4 of 8)"""


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


ON_ANY_MACHINE = {
    "attention": "math",
    "compile": False,
    "train": {"micro_batch_size": 4, "recompute": False, "early_stop": "never"},
}
"""What `auto` would choose by the machine."""


def test_it_reads_well_in_80_columns(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that drop with their rates, cost and place; the others are folded into one line."""
    monkeypatch.setattr(planning, "site_seconds", lambda run, model, site: 0.002)
    dropout = {
        "preset": "gpt2",
        "sites": {
            "head": 0.05,
            "layer": {"rate": 0.2, "profile": "increasing", "scale": "none"},
            "attention_context": {"rate": 0.2, "granularity": "locked"},
        },
        "masks": "keyed",
    }
    planned = plan_run(workshop.run(**ON_ANY_MACHINE, dropout=dropout))
    shown = "\n".join(map(fold, plan_table(planned.run, planned.plan)))
    place = str(workshop.folder)  # a word of its own, however long
    assert all(len(line) <= 80 for line in shown.splitlines() if place not in line)
    assert shown.partition("\n\n")[2] == PLANNED


def test_rates_that_move_are_told_at_three_moments(workshop: Workshop) -> None:
    dropout = {"schedule": {"mode": "early", "shape": "linear", "until": 0.5}}
    planned = plan_run(workshop.run(**ON_ANY_MACHINE, dropout=dropout))
    head, row, *_ = site_table(planned.plan["dropout"])
    assert head.split()[:5] == ["dropout", "site", "start", "middle", "end"]
    assert row.split()[:2] == ["embedding", "0.1"]
    assert row.split()[3] == "0"


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

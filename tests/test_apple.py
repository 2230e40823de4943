"""Nothing that an Apple GPU lacks is asked of it, wherever a model computes."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from apple import apple_gpu
from conftest import EVERYWHERE, Workshop

from gptlite.core import loss
from gptlite.core.generate import Generation
from gptlite.data.prepare import prepare
from gptlite.measure import memorisation, suites
from gptlite.measure.suites import SUITES, Effort
from gptlite.planning import audit, plan
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained

SMALL = Effort(64, 32, 32, (0, 0.5, 1), 2, (1, 3))
DROPOUT = EVERYWHERE.model_dump(mode="json")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"dropout": {"preset": "none"}},
    "dropout": {"dropout": DROPOUT},
    "native": {"dropout": {**DROPOUT, "masks": "native"}, "train": {"recompute": True}},
    "documents": {"dropout": DROPOUT, "data": {"layout": "documents"}},
    "modern": {
        "model": {
            **{"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1},
            **{"qk_norm": True, "bias": False, "tie_embeddings": False},
        },
        "optim": {"name": "muon"},
        "train": {"micro_batch_size": 2},
    },
}


@pytest.fixture
def apple() -> Iterator[None]:
    with apple_gpu():
        yield


@pytest.fixture(scope="module", params=["stream", "documents"])
def trained_here(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the CPU's."""
    workshop = Workshop(tmp_path_factory.mktemp("apple"))
    train(workshop.run(dropout=DROPOUT, data={"layout": request.param}), workshop.folder / "run")
    return workshop.folder / "run"


def there(run_dir: Path) -> Trained:
    """The same run on the Apple GPU."""
    config = run_dir / "config.yaml"
    mine = config.read_text()
    config.write_text(mine.replace("device: cpu", "device: mps"))
    try:
        trained = load_trained(run_dir, "best")
    finally:
        config.write_text(mine)
    assert trained.model.head.weight.device.type == "mps"
    return trained


@pytest.mark.usefixtures("apple")
@pytest.mark.parametrize(
    ("do", "why"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x.sum(dtype=torch.float64), "float64"),
        (lambda x: torch.ones(2, dtype=torch.float64).to("mps"), "float64"),
        (lambda x: torch.tensor([1.0], dtype=torch.float64, device="mps"), "float64"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device=x.device), "float64"),
        (lambda x: x + torch.ones(2, 2), "same device"),
        (lambda x: torch.ones(2)[x[0].long()], "same device"),
        (lambda x: x.numpy(), "numpy"),
    ],
)
def test_the_stand_in_refuses_what_an_apple_gpu_refuses(do: Any, why: str) -> None:
    x = torch.ones(2, 2).to("mps")
    with pytest.raises((TypeError, RuntimeError), match=why):
        do(x)


@pytest.mark.usefixtures("apple")
def test_the_stand_in_lets_through_what_an_apple_gpu_takes() -> None:
    x = torch.ones(2, 2).to("mps")
    assert (x + torch.tensor(1.0, dtype=torch.float64)).tolist() == [[2, 2], [2, 2]]
    assert x[torch.tensor([1])].cpu().double().tolist() == [[1, 1]]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_evaluates_samples_and_saves(workshop: Workshop, name: str) -> None:
    """With the losses that the CPU has, where the masks are the same ones."""
    run = workshop.run(**RUNS[name])
    here = train(run, workshop.folder / "here")
    with apple_gpu():
        run = run.model_copy(update={"device": "mps", "dtype": "auto"})
        found = train(run, workshop.folder / "there")
    if name != "native":
        assert found["val_loss"] == pytest.approx(here["val_loss"], rel=1e-4)
    assert math.isfinite(found["val_loss"])


def test_logits_made_in_parts_are_the_same_there(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workshop.run()
    here = train(run, workshop.folder / "here")
    monkeypatch.setattr(loss, "PART_BYTES", 1 << 12)
    with apple_gpu():
        found = train(run.model_copy(update={"device": "mps"}), workshop.folder / "there")
    assert found["val_loss"] == pytest.approx(here["val_loss"], rel=1e-4)


@pytest.mark.usefixtures("apple")
def test_a_run_goes_on_from_its_checkpoint(workshop: Workshop) -> None:
    sections = {"device": "mps", "dropout": DROPOUT, "optim": {"schedule": "constant"}}
    train(workshop.run(**sections, train={"max_steps": 4}), workshop.folder / "run")
    train(workshop.run(**sections), workshop.folder / "run", resume=True)
    train(workshop.run(**sections), workshop.folder / "whole")
    rows = [
        [json.loads(line)["train/loss"] for line in path.read_text().splitlines()]
        for path in (workshop.folder / name / "metrics.jsonl" for name in ("run", "whole"))
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_measures_what_it_does_on_the_cpu(
    trained_here: Path, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "SAMPLES", 2)
    monkeypatch.setattr(memorisation, "SAMPLE_TOKENS", 20)

    def measured(trained: Trained) -> Any:
        files = partial(prepare, trained.run, trained.tokenizer)
        found = suites.run_suites(trained, "val", [suite], files, effort=SMALL)[suite]
        found.pop("kinds", None)  # quotients of small differences, which rounding moves
        return found

    expected = measured(load_trained(trained_here, "best"))
    with apple_gpu():
        found = measured(there(trained_here))
    assert list(numbers(found)) == pytest.approx(list(numbers(expected)), rel=1e-2, abs=5e-3)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    ],
)
def test_generation_draws_what_it_does_on_the_cpu(
    trained_here: Path, changes: dict[str, Any]
) -> None:
    """Ragged prompts, past the end of the context."""

    def written(trained: Trained) -> list[Any]:
        options = trained.run.sample.model_copy(update={"max_new_tokens": 30, **changes})
        prompts = ["the", "", "it is you that he was for on"]
        documents = trained.run.data.layout == "documents"
        return Generation(
            *(trained.model, trained.tokenizer, prompts, options),
            **{"seed": 3, "num_samples": 2, "documents": documents},
        ).results()

    expected = written(load_trained(trained_here, "best"))
    with apple_gpu():
        assert written(there(trained_here)) == expected


@pytest.mark.usefixtures("apple")
def test_a_plan_is_timed_and_audited(workshop: Workshop) -> None:
    planned = plan.plan_run(workshop.run(device="mps", dropout=DROPOUT))
    assert not audit.audit(planned.run, planned.model, planned.rows)["problems"]

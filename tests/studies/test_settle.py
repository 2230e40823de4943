"""What a clock chooses is chosen once for a study."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RATES, Bench

from gptlite.core import device, loops
from gptlite.planning import auto
from gptlite.studies.config import load_study
from gptlite.studies.settle import fastest, share_cores


def answer_in_turn(monkeypatch: pytest.MonkeyPatch, key: str, values: Iterator[str]) -> None:
    """A clock that says something else each time it is asked for this key."""
    resolve = auto.resolve_run

    def chosen(run: Any, **sizes: Any) -> Any:
        value = next(values) if getattr(run, key) == "auto" else getattr(run, key)
        return resolve(run.model_copy(update={key: value}), **sizes)

    monkeypatch.setattr(auto, "resolve_run", chosen)


def train(bench: Bench, base: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    """The configs of the runs of a study."""
    bench.base.write_text(yaml.safe_dump({**yaml.safe_load(bench.base.read_text()), **base}))
    found = bench.run(**keys, evaluate=[], seeds=[1])
    paths = [Path(run["directory"]) / "config.yaml" for run in found["runs"]]
    return [yaml.safe_load(path.read_text()) for path in paths]


def test_all_runs_have_one_precision(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_in_turn(monkeypatch, "dtype", iter(["bfloat16", "float32"]))
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: True)
    configs = train(bench, {"dtype": "auto", "attention": "math"}, **RATES)
    assert [config["dtype"] for config in configs] == ["bfloat16", "bfloat16"]


@pytest.mark.skipif(loops.library() is None, reason="no C compiler here: nothing to choose from")
def test_runs_that_can_use_the_same_attention_have_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keyed masks of the weights leave no choice on a CPU."""
    answer_in_turn(monkeypatch, "attention", iter(["sdpa", "fused", "fused"]))
    points = {
        "none": {"dropout.rate": 0},
        "weights": {"dropout.preset": "none", "dropout.sites.attention_weights": 0.2},
        "others": {"dropout.preset": "none", "dropout.sites.embedding": 0.2},
    }
    configs = train(bench, {"dtype": "float32", "attention": "auto"}, axes={}, points=points)
    assert [config["attention"] for config in configs] == ["sdpa", "fused", "sdpa"]


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("attention", "sdpa")])
def test_the_largest_updates_decide(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    """A small first point must not slow down all the others."""
    asked = []

    def chosen(run: Any, **sizes: Any) -> Any:
        asked.append((run.model.n_embd, run.train.threads))
        return run.model_copy(update={key: value}), {}

    monkeypatch.setattr(auto, "resolve_run", chosen)
    other = {"dtype": "float32", "attention": "math"}[key]
    axes = {"model.n_embd": [8, 32, 16], key: [other, "auto"], "dropout.rate": [0]}
    made = load_study(bench.write(axes=axes, set={"train.threads": "auto"}))
    first = next(run for run in made.first_runs() if getattr(run, key) == "auto")
    assert first.model.n_embd == 8
    assert fastest(made, share_cores(first, 3), key) == value
    assert asked == [(32, 3)]

"""What tests of pages look at: runs and a study."""

import json
from pathlib import Path
from typing import Any

from conftest import EVERYWHERE, Workshop

from gptlite.data.prepare import prepare
from gptlite.measure import suites
from gptlite.measure.suites import Effort
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

SMALL = Effort(64, 32, 32, (0, 0.5, 1), 2, (1, 3))
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{ \x1b[31m \u202e"


def make_sources(folder: Path) -> Path:
    """A run with every measurement, three beside it, and a study."""
    workshop = Workshop(folder)
    dropout = EVERYWHERE.model_dump(mode="json")
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16}
    for name, over in (
        ("run", {"dropout": dropout}),
        ("other", {"seed": 7}),
        ("plain", {"dropout": {"rate": 0}}),
        ("bytes", {"tokenizer": {"kind": "byte"}}),
    ):
        train(workshop.run(model=model, sample={"interval": 4}, **over), workshop.folder / name)
    trained = load_trained(workshop.folder / "run", "best")
    arguments = (trained, "val", ["all"], lambda: prepare(trained.run))
    results = suites.run_suites(*arguments, effort=SMALL)
    suites.save_results(workshop.folder / "run", "val", trained.state.step, results, False)
    (workshop.folder / "study").mkdir()
    (workshop.folder / "study" / "study.json").write_text(json.dumps(study()))
    return workshop.folder


def study() -> dict[str, Any]:
    """As study.py writes it, with labels that nobody should trust."""

    def summary(x: float) -> dict[str, Any]:
        return {"mean": x, "low": x - 0.1, "high": x + 0.1, "values": [x - 0.05, x, x + 0.05]}

    labels = {0.0: "rate=0", 0.1: "rate=0.1", 0.3: HOSTILE}
    points = [
        {
            "label": name,
            "point": {"dropout.rate": rate},
            "metrics": {"best_val_loss": summary(2 + rate)},
        }
        for rate, name in labels.items()
    ]
    compared = {
        **{"metric": "best_val_loss", "difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.01},
        **{"against": "rate=0", "n": 3},
    }
    return {
        **{"name": HOSTILE, "axes": {"dropout.rate": [0, 0.1, 0.3]}, "seeds": [1, 2, 3]},
        "table": ["best_val_loss"],
        "runs": [
            {"label": HOSTILE, "seed": 1, "state": "failed", "why": HOSTILE},
            {"label": "rate=0", "seed": 1, "state": "done"},
        ],
        "points": points,
        "comparisons": [
            {**compared, "label": "rate=0.1", "above_seed_noise": True},
            {**compared, "label": HOSTILE, "above_seed_noise": None, "low": None, "high": None},
        ],
    }

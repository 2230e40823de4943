"""docs/research.md says what the published numbers and a real study.json say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median, stdev
from typing import Any

import pytest
from conftest import RATES, Bench

from gptlite.studies.comparison import half_width

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "research.md").read_text()
RATES_TRIED = ("0.05", "0.1", "0.2", "0.3", "0.5")
DEVIATION = 0.0134


def published(name: str) -> dict[str, dict[int, dict[str, float]]]:
    """Metrics by label and seed."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in (ROOT / "docs" / "dropout-study" / f"{name}.jsonl").read_text().splitlines():
        run = json.loads(line)
        if run["state"] == "done":
            found.setdefault(run["label"], {})[run["seed"]] = run["metrics"]
    return found


def deviations(name: str, metric: str, labels: list[str], rates: int) -> list[tuple[float, float]]:
    """Unpaired and paired, of the first rates with rate 0; {} in a label is the rate."""
    runs, found = published(name), []
    for label in labels:
        base = runs[label.format("0")]
        for rate in RATES_TRIED[:rates]:
            ours = runs[label.format(rate)]
            pairs = [(ours[seed][metric], base[seed][metric]) for seed in base]
            apart = sum(stdev(side) ** 2 for side in zip(*pairs, strict=True)) ** 0.5
            found.append((apart, stdev(a - b for a, b in pairs)))
    return found


def table_rows() -> Iterator[list[tuple[float, float]]]:
    """In the order of the page."""
    for size in (1000000, 100000, 30000, 10000):
        yield deviations("rates", "best_val_loss", [f"train_tokens={size}, rate={{}}"], 5)
    for size in (30000, 10000):
        labels = [
            f"train_tokens={size}, max_steps={n}, rate={{}}" for n in (75, 150, 300, 450, 600)
        ]
        yield deviations("annealed", "loss.loss", labels, 5)
    for size in (30000, 10000):
        labels = [f"train_tokens={size}, rate={{}}, lr={lr}" for lr in ("0.004", "0.008", "0.016")]
        yield deviations("learning_rate", "loss.loss", labels, 3)


def test_the_deviations_are_those_of_the_published_runs() -> None:
    rows = list(table_rows())
    shown = re.findall(r"\| (0\.\d{4}) \| (0\.\d{4}) \|$", PAGE, re.MULTILINE)
    assert shown == [
        tuple(f"{median(values):.4f}" for values in zip(*row, strict=True)) for row in rows
    ]
    paired = [deviation for row in rows[:4] for _, deviation in row]
    assert f"{median(paired):.4f}" == f"{DEVIATION}"
    assert f"the median is **{DEVIATION}**" in PAGE


def test_the_intervals_are_students() -> None:
    rows = re.findall(
        r"^\| (\d+) \| (\d\.\d{3}) \| (\d\.\d{3}) \| (0\.\d{4}) \|", PAGE, re.MULTILINE
    )
    assert len(rows) == 8
    for seeds, *shown in rows:
        n, t = int(seeds), half_width(int(seeds))
        wide = t / n**0.5
        assert shown == [f"{t:.3f}", f"{wide:.3f}", f"{wide * DEVIATION:.4f}"]
    for points, seeds, shown in re.findall(
        r"^\| (\d+) \| (\d+) \| (0\.\d{4}) \|", PAGE, re.MULTILINE
    ):
        assert int(points) * int(seeds) == 200
        assert shown == f"{half_width(int(seeds)) / int(seeds) ** 0.5 * DEVIATION:.4f}"


def test_the_hours_are_those_of_the_published_runs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| (\d+) min \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for name, seconds, minutes in rows:
        runs = [metrics for seeds in published(name).values() for metrics in seeds.values()]
        usual = median(run["seconds"] for run in runs)
        assert (seconds, minutes) == (f"{usual:.0f}", f"{200 * usual / 2 / 60:.0f}")


def fields(value: Any) -> Iterator[str]:
    """Keys of a study.json; those of the config and the names of metrics are not its own."""
    for item in value if isinstance(value, list) else []:
        yield from fields(item)
    for key, inner in value.items() if isinstance(value, dict) else []:
        yield key
        if key == "metrics" and isinstance(inner, dict):
            for metric in inner.values():
                yield from fields(metric)
        elif key not in ("set", "axes", "baseline", "point"):
            yield from fields(inner)


def test_every_field_of_study_json_is_explained(bench: Bench) -> None:
    found = bench.run(**RATES, seeds=[1])
    page = PAGE.split("## study.json")[1].split("## With pandas")[0]
    explained = set(re.findall(r"`([\w.]+)`", page))
    assert len(set(fields(found))) > 30
    assert set(fields(found)) <= explained
    trained = [name for name in found["metrics"] if not name.startswith("loss.")]
    assert set(trained) <= explained
    states = {"done", "failed", "pruned", "missing"}
    assert states <= explained


def test_the_lines_for_pandas_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas", reason="the page shows pandas, which nothing else needs")
    (lines,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert lines.count("\n") <= 12
    bench.out = bench.folder / "studies" / "rates"
    found = bench.run(**RATES, evaluate=[])
    monkeypatch.chdir(bench.folder)
    exec(lines, {})
    shown = capsys.readouterr().out
    (compared,) = (c for c in found["comparisons"] if c["metric"] == "best_val_loss")
    assert f"{compared['difference']:.4f}" in shown
    header = (bench.folder / "runs.csv").read_text().splitlines()[0].split(",")
    assert {"seed", "point.dropout.rate", "metrics.best_val_loss"} <= set(header)

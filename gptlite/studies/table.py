"""What the terminal is told of a study: a line for each run, and the table at the end."""

from collections.abc import Iterator
from typing import Any

from gptlite.runs.results import format_difference
from gptlite.terminal import format_duration
from gptlite.words import count


def outcome(run: dict[str, Any]) -> str:
    metrics = run["metrics"]
    what = f"{run['label']}, seed {run['seed']}: "
    if run["state"] != "done":
        return f"{what}{run['state']}: {run['why']}"
    took = format_duration(metrics["seconds"])
    return f"{what}best validation loss {metrics['best_val_loss']:.4f} nats ({took} of training)"


def table_lines(found: dict[str, Any]) -> Iterator[str]:
    """A block of lines per metric of the study's table."""
    runs, against = found["runs"], {}
    for comparison in found["comparisons"]:
        against[comparison["label"], comparison["metric"]] = comparison
    done = sum(run["state"] == "done" for run in runs)
    yield f"{found['name']}: {done} of {count(len(runs), 'run')} done"
    yield from (f"  {outcome(run)}" for run in runs if run["state"] == "failed")
    yield from (f"note: {note}" for note in found["notes"])
    width = max([len(point["label"]) for point in found["points"]], default=0)
    for metric in found["table"]:
        yield ""
        yield f"{metric}, mean ± 95 % interval over seeds; difference to the baseline in pairs"
        for point in found["points"]:
            value = point["metrics"].get(metric)
            if value is None:
                continue
            half = "" if value["low"] is None else f" ± {value['high'] - value['mean']:.4f}"
            line = f"  {point['label']:{width}}  {value['mean']:9.4f}{half:9}"
            other = against.get((point["label"], metric))
            yield line if other is None else f"{line}  {compare_words(other)}"


def compare_words(comparison: dict[str, Any]) -> str:
    above = {True: "yes", False: "no", None: "not known"}[comparison["above_seed_noise"]]
    value = format_difference(comparison["difference"])
    if comparison["p"] is not None:
        low, high = (format_difference(comparison[end]) for end in ("low", "high"))
        value += f" [{low}, {high}], p {comparison['p']:.2g}"
    return f"{value} to {comparison['against']}; above seed noise: {above}"

"""Make docs/tutorial.md anew: run what stands there, write what was printed, draw the pictures.

    python scripts/make_tutorial.py [--folder FOLDER] [--only-pictures]

All commands and Python blocks are run in their order, in a folder that is deleted afterwards unless
one is given; the ```text block after them becomes what they printed. Takes about six minutes.
"""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_cells import LIGHT
from torch import Tensor

import gptlite
from gptlite.core.masks import sample_keys
from gptlite.measure.look import (
    chosen_dropout,
    copy_with,
    fallen_of,
    look,
    read_ids,
    run_with,
)
from gptlite.measure.marks import FALLEN, KEPT, marks_of_mask
from gptlite.report import charts
from gptlite.report.charts import Dots
from gptlite.report.curves import lines
from gptlite.report.look import CELL, LABEL, grid, label, name_of, square, svg_head
from gptlite.report.series import Line, rate_color
from gptlite.runs.opened import Run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
PICTURES = PAGE.parent / "tutorial"
TEXT = "The sun was"
RATE = 0.5
LAYER, HEAD = 1, 1
"""That look at several tokens at once."""
EVEN = 0, 0
"""Layer and head that look at all tokens alike."""
STEPS = 60
"""Updates whose masks are compared."""
PADDING = 3
N_NUMBERS, FEATURES = 6, 24
"""Of each token, as numbers and as marks."""
TITLE, WIDEST = 28, 760
"""Pixels."""
TRAIN = "train/loss_dropout_off"
MOST_LINES = 40
"""Of what a command prints."""
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", help="where the runs are made; kept")
    parser.add_argument("--only-pictures", action="store_true", help="of runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(folder):
            if not options.only_pictures:
                PAGE.write_text(run_blocks(PAGE.read_text()))
            draw_pictures(folder)


def run_blocks(page: str) -> str:
    """The page with what its blocks print now; Python blocks share their names."""
    printed, names = "", dict[str, Any]()

    def run(block: re.Match[str]) -> str:
        nonlocal printed
        kind, text = block[1], block[2]
        if kind == "text":
            return f"```text\n{printed}```\n"
        if kind == "python":
            printed = run_python(text, names)
        elif kind == "":
            printed = "".join(run_command(line) for line in text.splitlines())
        return block[0]

    return BLOCKS.sub(run, page)


def run_python(text: str, names: dict[str, Any]) -> str:
    out, file = io.StringIO(), Path("block.py")
    file.write_text(text)
    with contextlib.redirect_stdout(out):
        names.update(runpy.run_path(str(file), names))
    return out.getvalue()


def run_command(line: str) -> str:
    """What a command prints to its standard output, its middle left out if it is long."""
    print(line, file=sys.stderr)
    words = [sys.executable, "-m", *shlex.split(line)]
    environment = os.environ | {"COLUMNS": "80"}
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    lines = out.stdout.splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 8], "...", *lines[-7:]]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def draw_pictures(folder: Path) -> None:
    run = gptlite.load("runs/with-dropout")
    found = look_at(run, LAYER, HEAD)
    context = look_at(run, LAYER, HEAD, site="attention_context")["picked"]
    save("mask", draw_numbers(run))
    save("attention-before", square(found, "before"))
    save("attention-after", square(found, "after"))
    save("context", grid(context["rows"], context["marks"], len(context["marks"][0])))
    save("rows", draw_row_sums([look_at(run, *EVEN, step) for step in range(STEPS)]))
    save("padding", draw_padding(run))
    save("train-eval", draw_modes(run))
    study = folder / "studies" / "tutorial"
    save("rates-training", draw_rates(study, TRAIN, "training loss"))
    save("rates-validation", draw_rates(study, "val/loss", "validation loss"))
    save("removed", draw_removed(folder / "runs"))


def look_at(
    run: Run, layer: int, head: int, step: int = 0, site: str | None = None
) -> dict[str, Any]:
    return look(run.trained, TEXT, layer=layer, head=head, step=step, rate=RATE, site=site)


def draw_numbers(run: Run) -> str:
    """Embeddings of the text as numbers, before dropout and after."""
    model = copy_with(run.trained, chosen_dropout(run.trained, RATE, "embedding", None), 1.0)
    ids = read_ids(run.trained, TEXT)
    watched, _ = run_with(model, ids, sample_keys(run.config.seed, 0, np.arange(1)))
    before, after = (tensor[0, :, :N_NUMBERS] for tensor in watched[model.drop_embedding])
    squares = [numbers(list(TEXT), before, before), numbers(list(TEXT), before, after)]
    return beside(squares, ["before", f"after: {FALLEN} fell, the rest doubled"])


def numbers(tokens: list[str], before: Tensor, values: Tensor) -> str:
    """SVG of a table of numbers, a row for each token; what fell is crossed out."""
    n, m = values.shape
    width = 1.5 * CELL
    parts = [svg_head(LABEL + m * width + 8, n * CELL + 6, f"Numbers, {n} by {m}")]
    for i, token in enumerate(tokens):
        y = i * CELL + CELL * 0.66
        parts.append(label(LABEL - 8, y, name_of(token, 8), ' text-anchor="end"'))
        for j in range(m):
            fell = bool(before[i, j] != 0 and values[i, j] == 0)
            said, color = (FALLEN, "var(--c2)") if fell else (one_digit(values[i, j]), "var(--ink)")
            parts.append(label(LABEL + (j + 1) * width, y, said, ' text-anchor="end"', color))
    return "".join([*parts, "</svg>"])


def one_digit(value: Tensor) -> str:
    return f"{round(float(value), 1) + 0.0:.1f}"  # no -0.0


def beside(drawn: Sequence[str], titles: Sequence[str]) -> str:
    """Several drawings of one size as one, with a title above each."""
    sizes = [re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0] for svg in drawn]
    width, height = (max(map(float, size)) for size in zip(*sizes, strict=True))
    parts = [svg_head(width * len(drawn), height + TITLE, "; ".join(titles))]
    for place, (svg, title) in enumerate(zip(drawn, titles, strict=True)):
        parts.append(label(place * width + LABEL, TITLE - 10, title, ""))
        size = f'<svg x="{place * width:g}" y="{TITLE}" width="{width:g}" height="{height:g}"'
        size += ' preserveAspectRatio="xMinYMin"'
        parts.append(svg.replace("<svg", size, 1))
    return "".join([*parts, "</svg>"])


def draw_row_sums(looks: Sequence[dict[str, Any]]) -> str:
    """The sum of each row of A after dropout, in each of these updates."""
    sums = np.array([found["attention"]["row_sums"][1] for found in looks])
    points = [
        {"x": row + 1, "mean": of.mean(), "low": None, "high": None, "values": of.tolist()}
        for row, of in enumerate(sums.T)
    ]
    name = "Sums of the rows of A after dropout"
    return charts.dots(name, [Dots("mean", points, 0)], "row", "sum of its weights")


def draw_padding(run: Run) -> str:
    """The same text as it is, behind padding and before it."""
    model = copy_with(run.trained, chosen_dropout(run.trained, RATE, "embedding", None), 1.0)
    ids, seed = read_ids(run.trained, TEXT), run.config.seed
    n, pad = ids.shape[1], ids.new_zeros(1, PADDING)
    rows = {"no padding": ids, "to the left": torch.cat([pad, ids], 1)}
    rows["to the right"] = torch.cat([ids, pad], 1)
    drawn = []
    for name, padded in rows.items():
        first = PADDING if name == "to the left" else 0
        place = torch.arange(padded.shape[1])[None]
        real = (place >= first) & (place < first + n)
        watched, _ = run_with(model, padded, sample_keys(seed, 0, np.arange(1)), real)
        fallen = fallen_of(watched[model.drop_embedding])[0, :, :FEATURES]
        tokens = ["(pad)"] * first + list(TEXT) + ["(pad)"] * (padded.shape[1] - n - first)
        drawn.append(grid(tokens, marks_of_mask(fallen.tolist()), FEATURES))
    return beside(drawn, list(rows))


def draw_modes(run: Run) -> str:
    """What leaves an MLP, in training and in evaluation."""
    looks = [look_at(run, LAYER, HEAD, step, "mlp_output")["picked"] for step in (0, 1)]
    drawn = [grid(picked["rows"], [row[:FEATURES] for row in picked["marks"]]) for picked in looks]
    whole = [KEPT * FEATURES] * len(TEXT)
    drawn.append(grid(list(TEXT), whole))
    return beside(drawn, ["training, update 0", "training, update 1", "evaluation"])


def draw_rates(study: Path, key: str, what: str) -> str:
    """A loss of the first seed of each rate."""
    series = []
    for path in study.rglob("metrics.jsonl"):
        run = gptlite.load(path.parent)
        rate = max(run.config.dropout.rates().values())
        if run.config.seed == 1:
            rows = [row for row in run.metrics() if "val/loss" in row]
            steps, losses = [row["step"] for row in rows], [row.get(key) for row in rows]
            series.append((rate, Line(f"rate {rate:g}", steps, losses, color=rate_color(rate))))
    ordered = [line for _, line in sorted(series, key=lambda found: found[0])]
    return lines(f"{what} of five rates", ordered, "updates", f"{what}, nats per character")


def draw_removed(runs: Path) -> str:
    series = []
    for name in ("with-dropout", "without-dropout"):
        (found,) = (runs / name / "eval").glob("knockout-val-*.json")
        result = json.loads(found.read_text())
        heads = result["kinds"]["head"]["mean"]["random"]["retained"]
        series.append(Line(name.replace("-", " "), result["fractions"], heads))
    x, y = "share of the heads that is removed", "skill that is left"
    return lines("Skill without some of the heads", series, x, y)


def save(name: str, svg: str) -> None:
    """A picture of its own: with colours and a size, and on white for pages that are dark."""
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    svg = svg.replace("<svg", f'<svg width="{min(WIDEST, 1.5 * width):.0f}"', 1)
    svg = re.sub(r'<g class="tips">.*</g>', "", svg)  # pictures of a page get no pointer
    for variable, color in LIGHT.items():
        svg = svg.replace(variable, color)
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    svg = re.sub(r"(<svg[^>]*>)", rf"\1{paper}", svg, count=1)
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{name}.svg").write_text(svg)


if __name__ == "__main__":
    main()

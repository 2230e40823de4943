"""docs/dropout-study.md has the tables and figures that its committed numbers make."""

import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptlite.studies.config import load_study

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "dropout-study.md").read_text()
SHOWN = dict(re.findall(r"<!-- (\w+) -->\n\n(.*?)\n\n<!-- end of \1 -->", PAGE, re.DOTALL))
FOLDER = ROOT / "docs" / "dropout-study"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script that writes the page, which draws its figures elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reproduce_dropout_study as script

    monkeypatch.setattr(sys.modules["study_cells"], "DOCS", tmp_path)
    return script


def test_every_study_with_numbers_has_its_place_on_the_page() -> None:
    assert SHOWN.keys() == {path.stem for path in FOLDER.glob("*.jsonl")} - {"mlp"}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_tables_and_figures_are_those_of_the_numbers(
    scripts: ModuleType, tmp_path: Path, name: str
) -> None:
    study = scripts.read_results(name, tmp_path)
    parts = [part for part in scripts.WRITERS[name](study) if not scripts.is_empty(part)]
    assert "\n\n".join(parts) == SHOWN[name]
    for path in tmp_path.glob("*.svg"):
        assert path.read_text() == (FOLDER / path.name).read_text()


def test_slopes_are_those_of_a_plane(scripts: ModuleType) -> None:
    from study_grids import slopes_of

    places = [(width, steps) for width in (32, 64, 128) for steps in (10, 20, 40)]
    pairs = [(f"ours {place}", f"theirs {place}") for place in places]
    runs = []
    for (width, steps), names in zip(places, pairs, strict=True):
        gain = 0.5 - 0.25 * (steps // 10).bit_length() + 0.125 * (width // 32).bit_length()
        for name, loss in zip(names, (2.0 + gain, 2.0), strict=True):
            runs.append({"label": name, "seed": 7, "state": "done", "metrics": {"loss.loss": loss}})
    assert slopes_of({"runs": runs}, 7, places, pairs) == pytest.approx([-0.25, 0.125])


def test_two_parts_of_retained_skill_add_up_to_it(scripts: ModuleType) -> None:
    """Heads worth as much that cover for each other are one part, heads worth less the other."""
    from study_removal import area, split_gain

    def run(label: str, kept: float, left: float) -> dict[str, Any]:
        areas = {"retained_area": kept, "contribution_area": left}
        metrics = {area("head", "mean", what): value for what, value in areas.items()}
        return {"label": label, "seed": 7, "state": "done", "metrics": metrics}

    def split(kept: float, left: float) -> list[float]:
        study = {"runs": [run("none", 0.5, 0.5), run("ours", kept, left)]}
        return [float(part) for parts in split_gain(study, "ours", "mean") for part in parts]

    assert split(0.75, 0.75) == pytest.approx([0.25, 0])  # worth all of the skill, as before
    assert split(0.75, 0.5) == pytest.approx([0, 0.25])
    assert sum(split(0.9, 0.7)) == pytest.approx(0.4)


def repeated_runs() -> list[tuple[bool, float]]:
    """Of each two runs of one config in two studies: whether they agree in every digit, and by how
    much their best validation losses differ."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for path in sorted(FOLDER.glob("*.jsonl")):
        study = load_study(ROOT / "configs" / "studies" / f"{path.stem}.yaml")
        lines = map(json.loads, path.read_text().splitlines())
        runs = {(run["label"], run["seed"]): run["metrics"] for run in lines}
        for job in study.jobs:
            if metrics := runs.get((job.point.label, job.seed)):
                found[job.name.rpartition("-")[2]].append(metrics)
    pairs = [pair for same in found.values() for pair in itertools.combinations(same, 2)]
    names = ("best_val_loss", "best_step", "val_loss", "train_loss")
    return [
        (all(a[n] == b[n] for n in names), abs(a["best_val_loss"] - b["best_val_loss"]))
        for a, b in pairs
    ]


def test_the_page_says_how_well_runs_repeat() -> None:
    repeated = repeated_runs()
    apart = [difference for alike, difference in repeated if not alike]
    words = r"(\d+) of (\d+) such pairs.*?by (0\.\d+) on average and by (0\.\d+) at most"
    told = re.search(words, " ".join(PAGE.split()))
    assert told
    few = [round(statistics.mean(apart), 3), round(max(apart), 3)]
    numbers = [float(number) for number in told.groups()]
    assert numbers == [len(repeated) - len(apart), len(repeated), *few]


def test_the_rule_of_decay_is_the_form_that_was_chosen(scripts: ModuleType) -> None:
    from study_recipe import FORMS, share_of

    from gptlite.planning.regularisation import DECAYED_IN_A_PASS, Scale, pick_decay

    form = "as the width, and the fourth root of the text"
    for tokens, width in ((4e4, 64), (1e5, 128), (4e5, 192)):
        scale = Scale(tokens, tokens / 2048, width)
        share = share_of(scale, DECAYED_IN_A_PASS, *FORMS[form])
        assert 0.01 * pick_decay(scale, 0.01)[0] == pytest.approx(share, rel=0.03)
    assert f"| {form} | {DECAYED_IN_A_PASS} |" in PAGE


def test_what_a_decay_misses_is_measured_from_the_lowest_loss(scripts: ModuleType) -> None:
    from study_recipe import Cell, Scale

    cell = Cell("", Scale(1.0, 1.0, 1), [0.01, 0.04], [3.0, 2.0])
    assert cell.excess(0.04) == 0
    assert cell.excess(0.02) == pytest.approx(0.5)  # half way, as 1, 2 and 4 are evenly apart

"""docs/dropout-study.md has the tables and figures that its committed numbers make."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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

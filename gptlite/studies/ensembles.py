"""The runs of a point, which differ by their seeds alone, measured as one model.

studies/NAME/ensembles/DIGEST.json   of the runs it is made of and how they were measured
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from gptlite import storage
from gptlite.runs.results import read_json
from gptlite.studies.config import Study

Record = dict[str, Any]


def measure_ensembles(study: Study, folder: Path, records: list[Record]) -> None:
    """Of each point whose runs are all done, unless it has been measured."""
    for members in members_by_point(study, records):
        path = result_path(study, folder, members)
        if not path.is_file():
            storage.make_folders(path.parent)
            storage.write_json(path, measure_point(study, members))


def members_by_point(study: Study, records: list[Record]) -> list[list[Record]]:
    """The runs of each point, where every seed has one."""
    points: dict[str, list[Record]] = {}
    for record in records:
        if record["state"] == "done":
            points.setdefault(record["label"], []).append(record)
    whole = len(study.config.seeds)
    return [members for members in points.values() if len(members) == whole]


def result_path(study: Study, folder: Path, members: list[Record]) -> Path:
    names = sorted(member["name"] for member in members)
    about = json.dumps([names, study.config.split, study.config.fast])
    return folder / "ensembles" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def measure_point(study: Study, members: list[Record]) -> dict[str, Any]:
    from gptlite.data.prepare import open_split
    from gptlite.measure.ensemble import run_ensemble
    from gptlite.measure.suites import FAST, FULL
    from gptlite.runs.trained import load_trained

    models = [load_trained(Path(member["directory"]), "best") for member in members]
    first, split = models[0], study.config.split
    files = partial(open_split, first.run, first.tokenizer, split, first.state.data_digest)
    effort = FAST._replace(loss_rows=None) if study.config.fast else FULL
    return run_ensemble(models, split, files, effort)


def ensemble_metrics(study: Study, folder: Path, records: list[Record]) -> dict[str, Any]:
    """By the label of a point, what its runs are worth as one."""
    found = {}
    for members in members_by_point(study, records):
        path = result_path(study, folder, members)
        if path.is_file():
            found[members[0]["label"]] = read_json(path, [])
    return found

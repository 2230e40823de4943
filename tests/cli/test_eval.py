"""What `gptlite eval` says: sentences that are right of good models and of bad ones."""

import io
import json
import re
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Workshop
from typer.testing import CliRunner, Result

from gptlite.cli.evaluate import show
from gptlite.cli.main import app
from gptlite.cli.sentences import (
    Number,
    compare,
    count_units,
    describe,
    share_of_units,
)
from gptlite.data.prepare import prepare
from gptlite.measure import memorisation, suites
from gptlite.measure.suites import SUITES, Effort
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

SMALL = Effort(128, 96, 96, (0, 0.3, 0.5, 1), 5, (1, 3), windows=8)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "measuring.md"
DROPOUT = {"preset": "gpt2", "rate": 0.2}
NAMES = [f"{first}{last}" for first in WORDS.split()[:5] for last in WORDS.split()]
RUNS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": DROPOUT, "optim": {"lr": 0.01}},
    "no dropout": {"dropout": {"preset": "none"}},
    "untrained": {"dropout": DROPOUT, "optim": {"lr": 1e-9, "min_lr": 0.0}},
    "padded": {"dropout": DROPOUT, "data": {"layout": "documents"}, "optim": {"lr": 0.01}},
}
SHORT = {"max_steps": 60, "eval_interval": 60, "log_interval": 60}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, sections in RUNS.items():
        workshop = Workshop(tmp_path_factory.mktemp("eval"))
        if name == "padded":
            workshop.text.write_text("\n".join(NAMES * 3))
        made[name] = workshop.folder / "run"
        train(workshop.run(**sections, train=SHORT), made[name])
    return made


@pytest.fixture(scope="module")
def found(runs: dict[str, Path]) -> dict[str, Any]:
    """What all suites give of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorisation, "SAMPLE_TOKENS", 40)
        return {name: measure(run) for name, run in runs.items()}


def measure(run: Path, suite: str = "all", **more: Any) -> dict[str, Any]:
    of = load_trained(run, "best")
    return suites.run_suites(of, "val", [suite], lambda: prepare(of.run), effort=SMALL, **more)


def say(results: dict[str, Any], full: bool = False) -> str:
    """What the command prints of these results."""
    about = {"run": "runs/a", "step": 60, "split": "val"}
    written = [Path(f"runs/a/eval/{suite}-val-step-00000060.json") for suite in results]
    with redirect_stdout(io.StringIO()) as out:
        show(about, results, written, full=full, json_=False)
    return out.getvalue()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "FAST", SMALL)


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["eval", "--fast", *arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("name", RUNS)
def test_all_suites_fit_a_screen(found: dict[str, Any], name: str) -> None:
    text = say(found[name])
    lines = text.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 110
    assert text.count("nats per token") == 1, "one loss; every other number is a difference"
    assert "runs/a/eval/*-val-step-00000060.json (6 files)" in text
    assert not re.search(r"None\b(?! of its)|nan|\binf\b|[{}\[\]]", text)


def test_the_command_says_where_its_files_are_and_makes_the_page_anew(
    runs: dict[str, Path], found: dict[str, Any]
) -> None:
    run = runs["dropout"]
    (run / "report.html").unlink(missing_ok=True)
    result = call("--run", str(run), "--suite", "loss,calibration")
    results = {name: found["dropout"][name] for name in ("loss", "calibration")}
    head, *sentences, files, last = say(results).splitlines()
    assert result.stdout.splitlines() == [
        head.replace("runs/a", str(run)),
        *sentences,
        files.replace("runs/a", str(run)),
        last,
    ]
    assert len(list(run.glob("eval/*-val-step-00000060.json"))) == 2
    assert f"report: {run / 'report.html'}" in result.stderr
    assert "gptlite eval: calibration" in (run / "report.html").read_text()
    assert "--full: --json has every number" in call("--full", "--json", code=2).stderr


def test_what_dropout_costs_is_one_number(runs: dict[str, Path], found: dict[str, Any]) -> None:
    result = call("--run", str(runs["dropout"]), "--dropout-active")
    assert re.fullmatch(
        r"With dropout left on, the loss is \d\.\d+ nats higher \(\d\.\d+ to \d\.\d+\)\.",
        result.stdout.splitlines()[1],
    )
    active = measure(runs["dropout"], "loss", dropout_active=True)["loss"]
    cost, (low, high) = active["dropout_cost"], active["intervals"]["dropout_cost"]
    assert active["loss"] - active["loss_dropout_off"] == cost
    assert low < cost < high
    plain = found["dropout"]["loss"]
    assert active["loss_dropout_off"] == plain["loss"]
    low, high = plain["intervals"]["loss"]
    assert high - low == pytest.approx(2 * 1.98 * plain["loss_standard_error"], rel=0.1)


def test_a_model_without_dropout_has_none_to_leave_on(
    runs: dict[str, Path], found: dict[str, Any]
) -> None:
    active = measure(runs["no dropout"], "loss", dropout_active=True)
    for results in (active, found["no dropout"]):
        assert "The model has no dropout that could be left on." in say(results)


def test_the_skill_of_an_untrained_model_is_no_ratio(found: dict[str, Any]) -> None:
    results = {"knockout": found["untrained"]["knockout"]}
    assert "cannot be said: the model may be no better than guessing" in say(results)
    assert "half of its skill" not in say(results)
    half = results["knockout"]["kinds"]["head"]["mean"]["random"]["half_at"]
    assert (half["value"], half["low"], half["high"]) == (None, None, None)
    assert half["reason"].startswith("the model may be no better")
    full = say(results, full=True)
    assert re.search(r"kinds\.head\.mean\.random\.half_at +none: the model may be no", full)


def test_a_loss_of_a_part_of_the_text_says_so(found: dict[str, Any]) -> None:
    full = say(found["dropout"], full=True)
    assert re.search(r"^  loss +\d\.\d{4}  \[\d\.\d+, \d\.\d+\]  on [\d,]+ targets$", full, re.M)
    losses = [line for line in full.splitlines() if re.match(r"  \S*loss +\d", line)]
    assert len(losses) >= 8
    assert all(re.search(r"  on [\d,]+ (targets|rows of training text)$", line) for line in losses)


def plain_name(key: str) -> str:
    """A key as the tables of the documentation have it."""
    names = {
        "KIND": "head|neuron|layer|dimension",
        "FILL": "mean|zero",
        "ORDER": "random|most_first|least_first",
    }
    if key.startswith("kinds."):
        for name, pattern in names.items():
            key = re.sub(rf"\.({pattern})(?=\.|$)", f".{name}", key, count=1)
    key = re.sub(r"^norm_variation\.\w+", "norm_variation.KIND", key)
    key = re.sub(r"^dimensionality\.\w+", "dimensionality.PLACE", key)
    key = re.sub(r"^mean_of_\w+", "mean_of_MEAN", key)
    key = re.sub(r"backup\.\d+", "backup.N", key)
    return re.sub(r"^(train|val)\.", "SPLIT.", key)


def names_of(value: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key of a document that has no key below it."""
    found = []
    for name, part in value.items():
        below = isinstance(part, dict) and not {"value", "low", "high"} <= set(part)
        whole = name == "intervals" or not below
        found += [prefix + name] if whole else names_of(part, f"{prefix}{name}.")
    return found


def explained(suite: str) -> set[str]:
    """Keys in the first column of the table of a suite."""
    section = DOCS.read_text().split(f"### Keys of `{suite}`\n", 1)[1].split("\n#", 1)[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", RUNS)
def test_every_key_is_explained(runs: dict[str, Path], found: dict[str, Any], name: str) -> None:
    """What --full prints, and what the document has besides, is in docs/measuring.md."""
    suite, seen = "", 0
    for line in say(found[name], full=True).splitlines()[1:]:
        if head := re.fullmatch(r"([\w-]+):", line):
            suite = head[1]
        elif key := re.match(r"  (\S+)  ", line):
            assert plain_name(key[1]) in explained(suite), f"{suite}: {key[1]}"
            seen += 1
    assert seen > 140
    assert set(found[name]) == set(SUITES)
    for suite, result in found[name].items():
        assert {plain_name(key) for key in names_of(result)} <= explained(suite)


def test_the_keys_of_a_part_of_a_text_with_dropout_on_are_explained(runs: dict[str, Path]) -> None:
    of = load_trained(runs["dropout"], "best")
    some = SMALL._replace(loss_rows=6)
    measured = suites.run_suites(
        of, "val", ["loss"], lambda: prepare(of.run), effort=some, dropout_active=True
    )
    assert measured["loss"]["rows"] == 6
    assert set(names_of(measured["loss"])) <= explained("loss")


def test_several_runs_as_one_are_told_and_explained(runs: dict[str, Path]) -> None:
    run = str(runs["dropout"])
    said = call("--ensemble", run, run).stdout
    assert "nats per token" in said
    assert "cannot be said: the ensemble gains nothing that is certain" in said
    assert "not compared with that: one model" in call("--ensemble", run).stdout
    for members in ([run, run], [run]):
        document = json.loads(call("--ensemble", *members, "--json").stdout)["ensemble"]
        assert {plain_name(key) for key in names_of(document)} <= explained("ensemble")


def test_text_of_one_row_is_told_without_intervals(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the of and")
    split = ["--split", str(tmp_path / "one.txt")]
    said = call("--run", str(runs["dropout"]), "--suite", "all", *split).stdout
    assert "In brackets" not in said
    assert "the text has only one row" in said
    assert "fewer than 5 rows" in said
    assert len(said.splitlines()) <= 25


def test_a_long_text_is_said_to_be_measured_in_part(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "FAST", SMALL._replace(loss_rows=6))
    assert re.search(r"of 96 places in 6 of \d+ rows", call("--run", str(runs["dropout"])).stdout)


def test_numbers_are_told_with_the_digits_that_they_have() -> None:
    assert Number(0.64791, 0.6123, 0.6842).write(" nats") == "0.648 nats (0.612 to 0.684)"
    assert Number(0.0729, 0.0708, 0.0751).write() == "0.0729 (0.0708 to 0.0751)"
    assert Number(1.3149).write() == "1.31"
    assert Number(0.61, 0.52, None).write() == "0.610 (0.520 or more)"
    assert Number(0.0, 0.0, 0.0).write() == "0.000 (0.000 to 0.000)"


def test_a_difference_is_told_without_its_sign_unless_it_is_noise() -> None:
    assert compare(Number(-0.648, -0.684, -0.612)) == "0.648 nats lower (0.612 to 0.684)"
    assert compare(Number(0.648)) == "0.648 nats higher"
    noise = compare(Number(0.0012, -0.0021, 0.0033))
    assert noise == "the same but for noise (-0.0021 to 0.0033 nats)"


@pytest.mark.parametrize(
    ("half", "n", "said"),
    [
        (Number(0.52, 0.47, 0.58), 16, "Half of the heads: 0.52 of them, 0.47 to 0.58"),
        (Number(0.34, 0.3, None), 16, "A third of the heads: 0.34 of them, 0.30 or more"),
        (Number(0.01), 512, "Hardly any of the heads: 0.01 of them"),
        (Number(0.97, 0.9, 1.0), 40, "Nearly all of the heads: 0.97 of them, 0.90 to 1.00"),
    ],
)
def test_many_units_are_told_as_a_share(half: Number, n: int, said: str) -> None:
    who, how_sure = share_of_units(half, n)
    assert f"{who} heads:{how_sure.replace('(', '').replace(')', '')}" == said


@pytest.mark.parametrize(
    ("half", "n", "said"),
    [
        (Number(0.38, 0.31, 0.44), 2, "None of its 2"),
        (Number(0.55, 0.45, 0.8), 4, "2 of its 4 (1 to 3)"),
        (Number(0.75, 0.7, None), 4, "3 of its 4 (2 to 4)"),
        (Number(0.3), 4, "1 of its 4"),
    ],
)
def test_few_units_are_counted(half: Number, n: int, said: str) -> None:
    """At 0.38 of two layers neither is gone."""
    assert "".join(count_units(half, n)) == said


def test_rounding_never_puts_a_number_outside_of_its_brackets() -> None:
    for value in (0.0499, 0.5, 1.2345, 123.4):
        for width in (1e-7, 3e-4, 0.02, 0.7):
            told = Number(value, value - width / 9, value + width).write()
            parts = [float(part) for part in re.findall(r"-?[\d.]+", told)]
            ordered = [parts[1], parts[0], parts[2]]
            assert all(a <= b for a, b in pairwise(ordered)), told


def test_a_suite_without_sentences_is_printed_by_name() -> None:
    assert describe("lm-eval", {"task": {"acc": 0.5}}) == []

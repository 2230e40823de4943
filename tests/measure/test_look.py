"""What `gptlite look` shows is what training does: its masks, its numbers, its scale."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop
from typer.testing import CliRunner

import gptlite
from gptlite.cli.main import app
from gptlite.config.reader import dump
from gptlite.core.dropout import Dropout, dropouts
from gptlite.core.masks import sample_keys
from gptlite.core.train import Trainer
from gptlite.errors import ConfigError
from gptlite.measure.look import look
from gptlite.report.look import figures_of, lines_of
from gptlite.runs.start import train
from gptlite.runs.trained import Trained, load_trained

EVERYWHERE = {
    **dict.fromkeys(("embedding", "attention_weights", "attention_context", "mlp_output"), 0.3),
    **{"attention_output": {"rate": 0.4, "granularity": "locked"}, "mlp_activation": 0.2},
    **{"token": 0.2, "key": 0.2, "final": 0.1},
}
TEXT = "the of and to"


def trained(workshop: Workshop, **sections: Any) -> Trained:
    train(workshop.run(**{"train": {"max_steps": 4}, **sections}), workshop.folder / "run")
    return load_trained(workshop.folder / "run", "best")


@pytest.mark.parametrize("attention", ["math", "fused"])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_falls_is_what_training_lets_fall(
    workshop: Workshop, attention: str, layer: int
) -> None:
    sites = {name: at for name, at in EVERYWHERE.items() if name not in ("key", "token")}
    of = trained(workshop, attention=attention, dropout={"preset": "none", "sites": sites})
    masks = gptlite.load(workshop.folder / "run").dropout_masks(TEXT, step=3)
    found = look(of, TEXT, layer=layer, head=1, step=3)
    before, after = (torch.tensor(found["attention"][name]) for name in ("before", "after"))
    fallen = masks["attention_weights"][layer][0, 1]
    assert torch.equal((before > 0) & (after == 0), (before > 0) & fallen)
    context = {name: torch.tensor(found["context"][name]) for name in ("before", "after")}
    gone = masks["attention_context"][layer][0, :, : context["before"].shape[1]]
    assert torch.equal(context["after"] == 0, gone | (context["before"] == 0))
    assert torch.equal(torch.tensor(found["locked"]["element"]), gone)
    assert {site["site"] for site in found["sites"]} == sites.keys()


def test_the_same_numbers_pass_as_in_a_training_step(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text as row 0 of an update, watched from outside."""
    settings = {"dropout": {"preset": "none", "sites": EVERYWHERE}, "attention": "math"}
    of, files = trained(workshop, **settings), workshop.files(**settings)
    trainer = Trainer(
        of.run, files.rows("train", of.run.model.context_length), of.tokenizer.vocab_size
    )
    trainer.model.load_state_dict(of.model.state_dict())
    ids = of.tokenizer.encode(TEXT)
    seen: dict[str, Any] = {}

    def note(module: Dropout, arguments: tuple[Any, ...], out: Any) -> None:
        seen.setdefault(module.site, (arguments[0], out))

    for module in dropouts(trainer.model):
        module.register_forward_hook(note)
    trainer.model.train()

    trainer.model(torch.tensor([ids]), samples=sample_keys(of.run.seed, 0, np.array([0])))
    found = look(of, TEXT)
    for which, tensor in zip(("before", "after"), seen["attention_weights"], strict=True):
        shown, passed = torch.tensor(found["attention"][which]), tensor[0, 0].detach()
        assert torch.equal(shown == 0, passed == 0)
        assert torch.allclose(shown, passed, atol=1e-6)
    for site in found["sites"]:
        before, after = seen[site["site"]]
        alive = before != 0
        assert site["share"] == pytest.approx(float(((after == 0) & alive).sum() / alive.sum()))


def test_what_stays_is_scaled_and_rows_no_longer_sum_to_one(workshop: Workshop) -> None:
    of = trained(workshop)
    found = look(of, TEXT, rate=0.5)
    assert {site["scale"] for site in found["sites"]} == {2.0}
    plain, after = found["attention"]["row_sums"]
    assert plain == pytest.approx([1.0] * len(plain))
    assert after[0] in (0.0, 2.0)  # one weight: all or nothing
    assert max(abs(a - 1) for a in after) > 0.1
    assert {"attention_weights", "attention_context"} <= {site["site"] for site in found["sites"]}


def test_evaluation_drops_nothing_and_padding_is_left_alone(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.2})
    found = look(of, TEXT)
    assert found["evaluation_drops"] == 0
    whole = gptlite.load(workshop.folder / "run").loss(TEXT)
    assert found["evaluation"]["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert found["training"]["loss"] != found["evaluation"]["loss"]
    assert found["padding"]["padding_untouched"]
    assert found["padding"]["text_the_same"]
    assert any(map(any, found["padding"]["fallen"]))


def test_looking_changes_nothing(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.2})
    before = {name: tensor.clone() for name, tensor in of.model.state_dict().items()}
    modes = [(module.training, module.p, module.rate) for module in dropouts(of.model)]
    look(of, TEXT, rate=0.7)
    assert all(torch.equal(of.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert [(m.training, m.p, m.rate) for m in dropouts(of.model)] == modes


def test_a_schedule_moves_the_rates_that_are_shown(workshop: Workshop) -> None:
    schedule = {"mode": "early", "until": 0.5, "shape": "linear"}
    of = trained(workshop, dropout={"rate": 0.4, "schedule": schedule}, train={"max_steps": 8})
    rates = [look(of, TEXT, step=step, max_steps=8)["strength"] for step in (0, 2, 4, 8)]
    assert rates == [1.0, 0.5, 0.0, 0.0]
    assert look(of, TEXT, step=4, max_steps=8)["sites"] == []


@pytest.mark.parametrize(
    ("options", "text", "told"),
    [
        ({"layer": 2}, TEXT, "--layer 2: the model has layers 0 to 1"),
        ({"head": -1}, TEXT, "--head -1: the model has heads 0 to 1"),
        ({}, "", "TEXT: 0 tokens; give 2 to"),
        ({}, "a" * 99, "TEXT: 99 tokens; give 2 to"),
        ({}, "Ж", "TEXT: character 'Ж' at position 1"),
    ],
)
def test_what_cannot_be_looked_at_is_named(
    workshop: Workshop, options: dict[str, Any], text: str, told: str
) -> None:
    of = trained(workshop)
    with pytest.raises(ConfigError, match=re.escape(told)):
        look(of, text, **options)


def test_native_masks_are_unknown_and_a_chosen_rate_is_not(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.2, "masks": "native"})
    with pytest.raises(ConfigError, match="--rate 0.5 shows"):
        look(of, TEXT)
    assert look(of, TEXT, rate=0.5)["sites"]


def test_the_terminal_has_room_for_it(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.2})
    for options in ({}, {"rate": 0.5}, {"layer": 1, "head": 1}):
        lines = list(lines_of(look(of, "the of and to t", **options)))
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        assert any("the rest ×" in line for line in lines)


def test_the_command_prints_it_and_writes_a_page(workshop: Workshop) -> None:
    trained(workshop)
    run, page = str(workshop.folder / "run"), workshop.folder / "look.html"
    asked = ("look", TEXT, "--run", run, "--rate", "0.5")
    result = CliRunner().invoke(app, [*asked, "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert "after dropout at attention_weights, rate 0.5" in result.stdout
    html = page.read_text()
    assert "A after dropout, rate 0.5" in html
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", html)
    numbers = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert numbers["tokens"] == list(TEXT)
    refused = CliRunner().invoke(app, ["look", "Ж", "--run", run])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_a_report_shows_one_text(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with dropout as it dropped, of one without at a rate that is said."""
    monkeypatch.chdir(workshop.folder)
    for rate, told in ((0.3, "A after dropout, rate 0.3"), (0.0, "Rate 0.5 instead of the run")):
        run = workshop.run(dropout={"rate": rate}, train={"max_steps": 4})
        Path("run.yaml").write_text(dump(run))
        out = f"run-{rate}"
        result = CliRunner().invoke(app, ["train", "--config", "run.yaml", "--out-dir", out])
        assert result.exit_code == 0, result.output
        html = Path(out, "report.html").read_text()
        assert "One text, and what falls of it" in html
        assert told in html
    Path(out, "look.json").write_text("{")
    result = CliRunner().invoke(app, ["report", out])
    assert "look.json: damaged" in Path(out, "report.html").read_text()


def test_marks_in_a_text_are_text_on_the_page(workshop: Workshop) -> None:
    of = trained(workshop, tokenizer={"kind": "byte"})
    drawn = "".join(figure.svg for figure in figures_of(look(of, "<b>&\x00\n", rate=0.5)))
    assert "<b>" not in drawn
    assert "\x00" not in drawn

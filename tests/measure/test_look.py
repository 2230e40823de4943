"""What `gptlite look` shows is what training does: its masks, its numbers, its scale."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, only
from typer.testing import CliRunner

import gptlite
from gptlite.cli.main import app
from gptlite.config.dropout import SITES
from gptlite.config.reader import dump
from gptlite.core.dropout import Dropout, dropouts
from gptlite.core.masks import mask_keys, sample_keys
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.errors import ConfigError
from gptlite.measure.look import look
from gptlite.measure.marks import EMPTY, FALLEN, KEPT
from gptlite.report.look import figures_of, lines_of
from gptlite.runs.opened import masks_of
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
        assert "<h3>Attention weights A, " in html
        assert told in html
    Path(out, "look.json").write_text("{")
    result = CliRunner().invoke(app, ["report", out])
    assert "look.json: damaged" in Path(out, "report.html").read_text()


def test_marks_in_a_text_are_text_on_the_page(workshop: Workshop) -> None:
    of = trained(workshop, tokenizer={"kind": "byte"})
    drawn = "".join(figure.svg for figure in figures_of(look(of, "<b>&\x00\n", rate=0.5)))
    assert "<b>" not in drawn
    assert "\x00" not in drawn


WHOLE = [name for name, kind in SITES.items() if not kind.by_feature]


def marks_of_training(
    of: Trained, site: str, granularity: str | None, layer: int, head: int
) -> list[str]:
    """What a network made for training with this site alone lets fall of ones, as marks."""
    dropout = only(site, rate=0.5, granularity=granularity)
    run, n = of.run.model_copy(update={"dropout": dropout}), len(TEXT)
    keys = mask_keys(sample_keys(run.seed, 3, np.array([0])), torch.arange(n)[None], None)
    masks = masks_of(GPT.of_run(run, of.tokenizer.vocab_size), run, keys, n, 1.0)[site]
    of_layer = masks[layer if SITES[site].per_layer else 0]
    there = torch.ones(1, 1, dtype=torch.bool)
    if site in ("attention_weights", "key"):
        fallen, there = of_layer[0, head], torch.ones(n, n, dtype=torch.bool).tril()
        if site == "key":
            fallen = fallen & ~torch.eye(n, dtype=torch.bool)
    elif site == "layer":
        fallen = torch.cat(masks).all(-1)
    elif site == "head":
        fallen = of_layer[0].all(-1)
    else:
        fallen = of_layer[0].all(-1, keepdim=True) if site == "token" else of_layer[0, :, :64]
    rows = zip(fallen.tolist(), there.expand_as(fallen).tolist(), strict=True)
    return [
        "".join((FALLEN if f else KEPT) if t else EMPTY for f, t in zip(*row, strict=True))
        for row in rows
    ]


@pytest.mark.parametrize("granularity", [None, "element", "locked"])
def test_any_site_is_picked_with_the_masks_of_training(
    workshop: Workshop, granularity: str | None
) -> None:
    of = trained(workshop, attention="math", dropout={"rate": 0.0})
    for site in SITES if granularity is None else [s for s in SITES if s not in WHOLE]:
        for layer, head in ((0, 1), (1, 0)):
            at = {"layer": layer, "head": head, "step": 3}
            found = look(of, TEXT, rate=0.5, site=site, granularity=granularity, **at)
            picked = found["picked"]
            assert picked["marks"] == marks_of_training(of, site, granularity, layer, head), site
            assert [of_site["site"] for of_site in found["sites"]] == [site]
            stays = site != "key" and KEPT in "".join(picked["marks"])
            assert picked["scale"] == (2.0 if stays else None)
            assert picked["rate"] == 0.5
            assert ("1" in picked["mask"]) == (granularity == "locked" or site in WHOLE)
            names = [f"{site} 0", f"{site} 1"] if site in ("head", "layer") else list(TEXT)
            assert picked["rows"] == names
            if picked["columns"]:
                assert picked["columns"] == list(TEXT)
                assert {len(row) for row in picked["marks"]} == {len(TEXT)}


def test_a_site_is_picked_from_the_dropout_of_the_run(workshop: Workshop) -> None:
    sites = {**EVERYWHERE, "layer": {"rate": 0.4, "profile": "increasing"}, "head": 0.3}
    of = trained(workshop, dropout={"preset": "none", "sites": sites})
    plain = look(of, TEXT, layer=1)
    assert (plain.pop("picked"), plain.pop("split_equal")) == (None, None)
    for site in SITES:
        found = look(of, TEXT, layer=1, site=site)
        picked, _ = found.pop("picked"), found.pop("split_equal")
        assert found == plain
        (same,) = [of_site for of_site in plain["sites"] if of_site["site"] == site]
        of_both = ("rate", "scale", "share", "shape")
        if site != "layer":
            assert [picked[name] for name in of_both] == [same[name] for name in of_both]
        assert "".join(same["mask"]).replace("S", "T").replace("Z", "C") == (
            picked["mask"].replace(", ", "")
        )
    assert look(of, TEXT, site="layer")["picked"]["rates"] == [0.2, 0.4]
    assert look(of, TEXT, site="attention_output")["picked"]["mask"] == "B, 1, C"
    other = look(of, TEXT, site="attention_output", granularity="element")
    assert other["picked"]["mask"] == "B, T, C"
    assert len(other["sites"]) == len(plain["sites"])


def test_where_nothing_drops_all_stays(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.0})
    for site in SITES:
        picked = look(of, TEXT, site=site)["picked"]
        assert (picked["rate"], picked["share"]) == (0.0, 0.0)
        assert KEPT in "".join(picked["marks"])
        assert FALLEN not in "".join(picked["marks"])
    hidden = look(of, TEXT, site="key")["picked"]["marks"]
    assert hidden == [KEPT * i + EMPTY * (len(TEXT) - i) for i in range(1, len(TEXT) + 1)]


def test_the_same_falls_of_a_row_however_the_batch_is_split(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = trained(workshop, dropout={"preset": "none", "sites": {**EVERYWHERE, "layer": 0.3}})
    assert look(of, TEXT, split=True)["split_equal"] is True
    assert look(of, TEXT, split=True, rate=0.5, site="final")["split_equal"] is True

    def by_size(samples: torch.Tensor, *more: Any) -> Any:
        return mask_keys(samples + len(samples), *more)

    monkeypatch.setattr("gptlite.core.model.mask_keys", by_size)
    assert look(of, TEXT, split=True)["split_equal"] is False
    assert look(of, TEXT, split=True, rate=0.5, site="final")["split_equal"] is False


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"site": "fnal"}, "--site fnal: no such site; did you mean 'final'?"),
        ({"site": "xyz"}, "--site xyz: no such site; there are token, embedding, key, "),
        ({"granularity": "locked"}, "--granularity: is of one site; name it with --site"),
        ({"site": "final", "granularity": "row"}, "--granularity row: give element or locked"),
        (
            {"site": "head", "granularity": "element"},
            "--granularity element: head drops whole units; there is a choice at embedding, key, ",
        ),
        ({"rate": 1.0, "site": "final"}, "--rate 1: give 0 or more, below 1"),
    ],
)
def test_a_site_that_cannot_be_picked_is_named(
    workshop: Workshop, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        look(trained(workshop), TEXT, **asked)


def test_a_picked_site_has_room_in_the_terminal_and_on_the_page(workshop: Workshop) -> None:
    of = trained(workshop, dropout={"rate": 0.2})
    for site in SITES:
        for rate in (None, 0.5):
            found = look(of, "the of and to t", rate=rate, site=site, layer=1)
            lines, picked = list(lines_of(found)), found["picked"]
            assert max(map(len, lines)) <= 80, max(lines, key=len)
            beginning = re.compile(rf"{site}(, layer 1)?(, head 0)?: tensor \(")
            (begin,) = [i for i, line in enumerate(lines) if beginning.match(line)]
            assert f"tensor ({picked['tensor']}) = 1 × " in lines[begin]
            assert f"mask ({picked['mask']}), rate {picked['rate']:.3g}" in lines[begin + 1]
            shown = [line[9:] for line in lines[begin + 3 :]][: len(picked["marks"])]
            assert shown[:2] == [row.rstrip() for row in picked["marks"][:2]]
            assert f"at {site} alone" in "".join(lines) or rate is None
            figures = figures_of(found)
            assert [f.title for f in figures if f.title == lines[begin]] == [lines[begin]]


def test_the_command_picks_a_site(workshop: Workshop) -> None:
    trained(workshop)
    run, page = str(workshop.folder / "run"), workshop.folder / "look.html"
    asked = ["look", TEXT, "--run", run, "--rate", "0.5", "--site", "mlp_activation"]
    result = CliRunner().invoke(app, [*asked, "--granularity", "locked", "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert "mlp_activation, layer 0: tensor (B, T, F) = 1 × 13 × 128\n" in result.stdout
    assert "mask (B, 1, F), rate 0.5: × fell" in result.stdout
    assert "row = token, column = feature (the first 64 of 128)" in result.stdout
    assert "mlp_activation, layer 0: tensor (B, T, F)" in page.read_text()
    refused = CliRunner().invoke(app, [*asked[:-1], "head", "--granularity", "locked"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)

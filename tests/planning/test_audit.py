"""The plan of every site, and an audit that finds what is dead, leaking or off its rate."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERYWHERE, Workshop, only
from torch import Tensor, nn
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.config.dropout import SITES, DropoutConfig
from gptlite.config.reader import dump
from gptlite.config.run import RunConfig
from gptlite.core.dropout import Dropout, dropouts
from gptlite.core.model import GPT, NO_DROPOUT
from gptlite.data.batches import Layout
from gptlite.planning import plan as planning
from gptlite.planning.audit import advice, audit, audit_lines, site_plan

PARTS = {"attention": "math", "compile": False}


def audited(
    workshop: Workshop,
    dropout: DropoutConfig,
    sabotage: Callable[[GPT], Any] = lambda model: None,
    **sections: Any,
) -> dict[str, Any]:
    run = workshop.run(**PARTS, train={"micro_batch_size": 8}, **sections)
    run = run.model_copy(update={"dropout": dropout})
    files = workshop.files(**sections)
    model = GPT(run.model, files.meta["vocab_size"], dropout)
    sabotage(model)
    return audit(run, model, files.rows("train", run.model.context_length))


def modules(model: GPT, site: str) -> list[Dropout]:
    return [module for module in dropouts(model) if module.site == site]


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("masks", ["keyed", "native"])
def test_an_honest_network_has_no_problem(workshop: Workshop, masks: str, layout: str) -> None:
    found = audited(
        workshop, EVERYWHERE.model_copy(update={"masks": masks}), data={"layout": layout}
    )
    assert found["problems"] == []
    for site in found["sites"]:
        assert abs(site["standard_errors_off"]) <= 4
        assert site["training"] == pytest.approx(0.3, abs=0.15)
        assert site["evaluation"] == 0
        assert site["units"] * 0.3 >= 20


def test_a_layers_one_mask_is_counted_once(workshop: Workshop) -> None:
    found = audited(workshop, only("layer", rate=0.5))
    units = {site["site"]: site["units"] for site in found["sites"]}
    assert units["layer"] == 3 * 8 * 2  # passes until 20 are expected to drop, rows, layers


@pytest.mark.parametrize("site", [site for site in SITES if SITES[site].by_feature])
def test_locked_sites_are_counted_by_their_masks(workshop: Workshop, site: str) -> None:
    element = audited(workshop, only(site, rate=0.3))
    locked = audited(workshop, only(site, rate=0.3, granularity="locked"))
    assert element["problems"] == locked["problems"] == []
    units = {
        e["site"]: (e["units"], k["units"])
        for e, k in zip(element["sites"], locked["sites"], strict=True)
    }
    assert units[site][1] < units[site][0]


@pytest.mark.parametrize("site", SITES)
def test_a_dead_site_is_found(workshop: Workshop, site: str) -> None:
    def kill(model: GPT) -> None:
        for module in modules(model, site):
            module.forward = lambda x, *rest: x  # type: ignore[method-assign]

    found = audited(workshop, only(site, rate=0.5), kill)
    assert len(found["problems"]) == 1
    assert f"dropout.sites.{site}: dead: none of " in found["problems"][0]


def test_a_site_that_no_tensor_passes_is_found(workshop: Workshop) -> None:
    found = audited(workshop, only("embedding"), lambda m: setattr(m, "drop_embedding", Through()))
    assert found["problems"] == ["dropout.sites.embedding: dead: rate 0.5 reaches nothing"]


class Through(nn.Module):
    def forward(self, x: Tensor, keys: Any) -> Tensor:
        return x


# The module of `key` is not even called in evaluation.
@pytest.mark.parametrize("site", [site for site in SITES if site != "key"])
def test_a_leak_into_evaluation_is_found(workshop: Workshop, site: str) -> None:
    def leak(model: GPT) -> None:
        for module in modules(model, site):
            original = module.forward

            def forward(*inputs: Any, module: Dropout = module, original: Any = original) -> Tensor:
                meant, module.training = module.training, True
                y = original(*inputs)
                module.training = meant
                return y

            module.forward = forward  # type: ignore[method-assign]

    found = audited(workshop, only(site, rate=0.5), leak)
    assert any(f"dropout.sites.{site}: leaks: drops " in problem for problem in found["problems"])


@pytest.mark.parametrize("site", SITES)
def test_a_site_off_its_rate_is_found(workshop: Workshop, site: str) -> None:
    def loosen(model: GPT) -> None:
        for module in modules(model, site):
            original = module.forward

            def forward(*inputs: Any, module: Dropout = module, original: Any = original) -> Tensor:
                meant, module.p = module.p, 0.97
                y = original(*inputs)
                module.p = meant
                return y

            module.forward = forward  # type: ignore[method-assign]

    found = audited(workshop, only(site, rate=0.5), loosen)
    assert any(
        f"dropout.sites.{site}: off: dropped 0.9" in problem for problem in found["problems"]
    )


@pytest.mark.parametrize("profile", ["increasing", [1.0, 0.2]])
def test_the_rate_of_a_layer_is_that_of_its_profile(workshop: Workshop, profile: Any) -> None:
    """The network is asked what it drops, never what it means to drop."""
    dropout = only("mlp_output", rate=0.4, profile=profile)
    found = audited(workshop, dropout)
    (site,) = (site for site in found["sites"] if site["site"] == "mlp_output")
    mean = 0.3 if profile == "increasing" else 0.24
    assert site["planned"] == pytest.approx(mean, abs=1e-4)
    assert site["training"] == pytest.approx(mean, abs=0.02)
    assert found["problems"] == []

    def level(model: GPT) -> None:
        for module in modules(model, "mlp_output"):
            module.p = 0.4

    (problem,) = audited(workshop, dropout, level)["problems"]
    assert problem.startswith("dropout.sites.mlp_output: off: dropped 0.39")

    def swap(model: GPT) -> None:
        first, last = modules(model, "mlp_output")
        first.p, last.p = last.p, first.p

    (problem,) = audited(workshop, dropout, swap)["problems"]
    assert problem.startswith("dropout.sites.mlp_output: off in layer 0: dropped 0.")


def test_dropout_without_a_name_is_found(workshop: Workshop) -> None:
    """A functional call in the network, in training only or always (nanoGPT PR 240)."""

    def hide(model: GPT) -> None:
        model.norm.register_forward_hook(lambda m, i, y: F.dropout(y, 0.1, m.training))

    found = audited(workshop, only("embedding"), hide)
    assert found["problems"] == [
        "dropout: with every site at rate 0 training differs from evaluation"
    ]

    def hide_always(model: GPT) -> None:
        model.norm.register_forward_hook(lambda m, i, y: F.dropout(y, 0.1, True))

    found = audited(workshop, only("embedding"), hide_always)
    assert "dropout: two passes of evaluation differ; something drops there" in found["problems"]


def test_the_share_of_frozen_parameters_is_told(workshop: Workshop) -> None:
    """A mask that all samples and positions share would freeze; per position nearly nothing is."""
    found = audited(workshop, only("mlp_activation", rate=0.5))
    shares = found["zero_gradient_share"]
    assert shares["dropout_on"] < 0.01

    def freeze(model: GPT) -> None:
        half = torch.arange(128) % 2 == 0
        for module in modules(model, "mlp_activation"):
            module.forward = lambda x, *rest: x * half * 2  # type: ignore[method-assign]

    frozen = audited(workshop, only("mlp_activation", rate=0.5), freeze)["zero_gradient_share"]
    assert frozen["dropout_on"] > 0.2


def test_an_audit_leaves_the_generator_alone(workshop: Workshop) -> None:
    states = []

    def remember(model: GPT) -> None:  # making the model draws from it, as torch's layers do
        states.append(torch.get_rng_state())

    audited(workshop, EVERYWHERE, remember)
    assert torch.equal(torch.get_rng_state(), states[0])


def plan_of(workshop: Workshop, **dropout: Any) -> dict[str, dict[str, Any]]:
    run = workshop.run(
        **PARTS, dropout=dropout, train={"micro_batch_size": 4, "max_steps": 100, "batch_size": 8}
    )
    model = GPT(run.model, 50, run.dropout)
    return {entry["site"]: entry for entry in site_plan(run, model, 100)}


def test_a_plan_says_shapes_masks_and_rates_over_the_run(workshop: Workshop) -> None:
    plan = plan_of(
        workshop,
        preset="gpt2",
        sites={
            "attention_context": {"rate": 0.2, "granularity": "locked"},
            "layer": {"rate": 0.3, "profile": "increasing", "scale": "none"},
            "head": 0.1,
        },
        schedule={"mode": "late", "shape": "linear", "until": 0.25},
    )
    assert list(plan) == list(SITES)
    weights, context, layer = (plan[s] for s in ("attention_weights", "attention_context", "layer"))
    assert (weights["shape"], weights["mask"]) == ([4, 2, 16, 16], [4, 2, 16, 16])
    assert (context["shape"], context["mask"]) == ([4, 16, 32], [4, 1, 32])
    assert (layer["shape"], layer["mask"], layer["scale"]) == ([4, 16, 32], [4, 1, 1], "none")
    assert (plan["head"]["shape"], plan["head"]["mask"]) == ([4, 2, 16, 16], [4, 2, 1, 1])
    assert plan["mlp_activation"]["shape"] == [4, 16, 128]
    assert weights["module"] == "blocks.*.attention.drop_weights"
    assert weights["elements_per_update"] == 2 * 8 * 2 * 16 * 16
    assert context["rates"]["start"] == 0
    assert context["rates"]["middle"] == pytest.approx(0.2 / 3)
    assert context["rates"]["end"] == pytest.approx(0.2 * (0.99 - 0.25) / 0.75)
    assert plan["final"]["masks"] == "-"
    assert {plan[s]["masks"] for s in ("embedding", "layer", "head")} == {"keyed"}


def test_native_sites_are_announced(workshop: Workshop) -> None:
    assert plan_of(workshop, preset="gpt2", masks="native")["embedding"]["masks"] == "native"


@pytest.mark.parametrize(
    ("dropout", "epochs", "said"),
    [
        (
            {"preset": "gpt2"},
            0.9,
            ["dropout is on", "rate 0 for 0.9 epochs", "costs more than it gains"],
        ),
        ({"preset": "gpt2"}, 20.0, []),
        ({"preset": "none"}, 2.0, []),
        ({"preset": "none"}, 20.0, ["dropout is off", "rate 0.1 for 20 epochs"]),
        ({"preset": "gpt2", "rate": 0.6}, 50.0, ["half and more", "embedding 0.6"]),
    ],
)
def test_advice_is_what_was_measured(
    workshop: Workshop, dropout: dict[str, Any], epochs: float, said: list[str]
) -> None:
    plan = {"epochs": epochs, "rows_per_epoch": 5000, "train_tokens": 1e6}
    lines = list(advice(workshop.run(dropout=dropout), plan))
    assert len(lines) == (1 if said else 0)
    assert all(words in lines[0] for words in said)


def config_file(workshop: Workshop, run: RunConfig) -> str:
    path = workshop.folder / "run.yaml"
    path.write_text(dump(run))
    return str(path)


def test_the_command_shows_costs_and_passes_an_honest_network(workshop: Workshop) -> None:
    run = workshop.run(dropout={"preset": "gpt2", "sites": {"head": 0.1}})
    file = config_file(workshop, run)
    result = CliRunner().invoke(app, ["plan", "--config", file, "--audit"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("attention_weights "))
    assert lines[at].split()[1] == "0.1"
    assert lines[at + 1].startswith("  2 x blocks.*.attention.drop_weights: ")
    assert all(len(line) <= 80 for line in lines if str(workshop.folder) not in line)
    assert lines[-1] == "passed: 5 of 5 sites drop as planned, none in evaluation"
    assert "drops attention weights by keyed masks" in result.stdout
    assert "parameters with a gradient of exactly 0" in result.stdout
    document = json.loads(
        CliRunner().invoke(app, ["plan", "--config", file, "--audit", "--json"]).stdout
    )
    assert document["audit"]["problems"] == []
    costs = {s["site"]: s["milliseconds_per_update"] for s in document["dropout"]}
    assert {site for site, cost in costs.items() if cost > 0} == {
        *("embedding", "attention_weights", "head", "attention_output", "mlp_output")
    }


def test_the_command_fails_on_a_dead_site(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(rows: Layout, model: GPT) -> None:
        for module in modules(model, "mlp_output"):
            module.forward = lambda x, *rest: x  # type: ignore[method-assign]

    original = planning.plan_run

    def plan_run(run: RunConfig, world_size: int, own: Any) -> planning.Planned:
        planned = original(run, world_size)
        dead(planned.rows, planned.model)
        return planned

    monkeypatch.setattr(planning, "plan_run", plan_run)
    run = workshop.run(dropout={"preset": "gpt2"})
    result = CliRunner().invoke(
        app, ["plan", "--config", config_file(workshop, run), "--audit", "--json"]
    )
    assert result.exit_code == 1
    assert "dropout.sites.mlp_output: dead: none of" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert len(json.loads(result.stdout)["audit"]["problems"]) == 1


def test_a_model_without_dropout_has_nothing_to_audit(workshop: Workshop) -> None:
    found = audited(workshop, NO_DROPOUT)
    assert found["problems"] == []
    assert audit_lines(found)[-1] == "passed: no site drops"

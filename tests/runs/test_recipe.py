"""A config made for a text: every choice has a reason, and the YAML says what is trained."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, prose
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.config.reader import dump
from gptlite.config.run import DataConfig, OptimConfig, RunConfig
from gptlite.data.prepare import prepare
from gptlite.errors import ConfigError, DataError
from gptlite.planning import budget
from gptlite.planning.budget import Budget, Rung
from gptlite.planning.rehearsal import Costs, EvaluationPace
from gptlite.runs import recipe
from gptlite.runs.launch import make_launch
from gptlite.runs.origin import load_run

NAMES = [f"{a}{b}{c}" for a in ("an", "bel", "cor") for b in "aeiou" for c in ("", "n", "lia")] * 10
NOW = 100.0
"""What the clock says, always."""


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update takes as long as its arithmetic, not as this machine is busy; no time passes."""

    def seconds(run: RunConfig) -> float:
        tokens = run.train.batch_size * run.model.context_length
        dropout = 1.2 if run.dropout.rate else 1.0
        return 6e-10 * run.model.n_parameters(1) * tokens * dropout

    def time_rung(rung: Rung, *_: Any) -> Rung:
        return rung._replace(seconds=seconds(rung.run))

    def rehearse(run: RunConfig, *_: Any) -> Costs:
        return Costs(0.0, seconds(run), EvaluationPace(seconds(run) / 3, 64), 0.01, 0.1)

    monkeypatch.setattr(budget, "time_rung", time_rung)
    monkeypatch.setattr(recipe, "rehearse", rehearse)
    monkeypatch.setattr(recipe, "Budget", partial(Budget, clock=lambda: NOW))


def composed(
    workshop: Workshop, minutes: float = 0.5, *overrides: str, began: float | None = None
) -> tuple[RunConfig, str]:
    cache = f"data.cache_dir={workshop.folder / 'cache'}"
    run, text, _ = recipe.make_recipe([str(workshop.text)], minutes, [cache, *overrides], began)
    return run, text


def look(workshop: Workshop, text: str) -> recipe.Survey:
    workshop.text.write_text(text, encoding="utf-8")
    return recipe.survey(DataConfig(source=str(workshop.text)))


def chosen(found: recipe.Survey) -> dict[str, Any]:
    return {choice.key: choice.value for choice in recipe.text_choices(found)}


def test_the_yaml_is_the_run(workshop: Workshop) -> None:
    run, text = composed(workshop)
    path = workshop.folder / "recipe.yaml"
    path.write_text(text)
    assert load_run([str(path)], [f"data.cache_dir={workshop.folder / 'cache'}"]) == run
    assert text.startswith(f"# For {workshop.text} in 0.5 minutes")
    for key in ("kind: bpe", "n_layer:", "max_steps:", "preset:", "name: muon"):
        (line,) = (line for line in text.splitlines() if key in line)
        assert "  # " in line, line


def test_a_text_is_cut_as_its_size_and_kind_allow(workshop: Workshop) -> None:
    names = look(workshop, "\n".join(NAMES))
    assert names.longest_line == 7
    assert chosen(names) == {"data.layout": "documents", "tokenizer.kind": "char"}
    assert chosen(look(workshop, prose())) == {"tokenizer.kind": "bpe", "tokenizer.vocab_size": 300}
    sentence = chosen(look(workshop, "One sentence is all there is."))
    assert sentence == {"tokenizer.kind": "char"}
    sizes = {
        size: chosen(recipe.Survey(size, 90, None))["tokenizer.vocab_size"]
        for size in (recipe.BPE_FROM, 200_000, 1_100_000, 10_000_000, 1 << 40)
    }
    assert list(sizes.values()) == [300, 512, 1024, 4096, 16384]


RUNNING = {
    "verse": "the sea\nthe sky\n" * 300,
    "few lines": "short\n" * 50,
    "Chinese": "床前明月光\n疑是地上霜\n举头望明月\n低头思故乡\n" * 60,
    "Thai": "ทุกคนเกิดมามีอิสระ\nและเสมอภาคกัน\nในศักดิ์ศรีและสิทธิ\n" * 80,
    "Japanese": "すべての人間は\n生れながらにして\n自由である\n" * 80,
    "DNA": "GATTACAGATTACA\nCCGTTAGACCAT\nTTGACCA\n" * 80,
    "hexadecimal": "deadbeef\n0badcafe\n8badf00d\n" * 80,
    "code": "begin();\nif(x>1){\ncount++;\n}\nend();\n" * 60,
    "minified": "thisisalineofforty_lettersnamesarenot\nandthisisanotherlineofthatsort\n" * 100,
}
LISTED = {
    "names": "\n".join(NAMES),
    "names of two words, some": "Ann\nJean-Luc\nO'Neill\nCorbin\nFitzgerald\nMary Ann\nZoë\n" * 40,
    "Russian": "Анна\nБорис\nСветлана\nВладимир\n" * 60,
    "Hindi": "अनिल\nसीता\nकमला\nविजय\nगीता\nसुनील\n" * 60,
    "Korean": "김민준\n이서연\n박지훈\n최수빈\n" * 60,
}


@pytest.mark.parametrize("text", RUNNING.values(), ids=RUNNING)
def test_short_lines_without_spaces_are_not_always_names(workshop: Workshop, text: str) -> None:
    assert look(workshop, text).longest_line is None


@pytest.mark.parametrize("text", LISTED.values(), ids=LISTED)
def test_a_word_a_line_is_a_list(workshop: Workshop, text: str) -> None:
    assert look(workshop, text).longest_line == max(map(len, text.split("\n")))


def test_more_time_means_a_larger_model_and_more_updates(workshop: Workshop) -> None:
    workshop.text.write_text(prose(20_000))
    runs = [composed(workshop, minutes)[0] for minutes in (0.5, 5, 120)]
    widths = [run.model.n_embd for run in runs]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_a_short_text_is_not_read_more_often_than_it_helps(workshop: Workshop) -> None:
    run, text = composed(workshop, 600)
    rows = prepare(run).rows("train", run.model.context_length).n_rows
    assert run.train.max_steps * run.train.batch_size / rows <= budget.MOST_EPOCHS + 1
    assert f"{budget.MOST_EPOCHS} passes over the text" in text
    assert run.dropout.rate == 0.1


def test_what_is_set_wins_and_is_noted(workshop: Workshop) -> None:
    run, text = composed(workshop, 0.5, "model.n_layer=1", "train.max_steps=7")
    assert (run.model.n_layer, run.train.max_steps) == (1, 7)
    assert "n_layer: 1  # as asked" in text


def test_what_has_passed_since_the_command_began_is_taken_off(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(0.0, 0.2, EvaluationPace(0.0, 64), 0.0, 0.0)
    monkeypatch.setattr(recipe, "rehearse", lambda *_: costs)
    early, late = (composed(workshop, 0.2, began=at)[0] for at in (NOW, NOW - 3))
    assert early.model == late.model
    assert early.train.max_steps == 12 / 0.2
    left = (12 - 3 * (1 + budget.ENDING)) * (1 - budget.MOST_FOR_PAGES)
    assert late.train.max_steps == int(left / 0.2)


def test_the_model_is_timed_as_it_will_be_trained(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its dropout, where so many updates call for one, and with what is asked for."""
    tried = []
    original = recipe.rehearse

    def rehearse(run: RunConfig, *rest: Any) -> Costs:
        tried.append(run)
        return original(run, *rest)

    monkeypatch.setattr(recipe, "rehearse", rehearse)
    run, _ = composed(workshop, 0.5, "model.n_layer=1", "optim.name=adamw", "model.n_head=4")
    assert run.dropout == tried[-1].dropout
    assert run.optim.name == tried[-1].optim.name == "adamw"
    assert run.model == tried[-1].model
    assert (run.model.n_layer, run.model.n_head) == (1, 4)


def test_another_dropout_rate_than_was_guessed_is_timed_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def rehearse(run: RunConfig, *_: Any) -> Costs:
        tried.append(run.dropout.rate or 0.0)
        return Costs(0.0, 1.0, EvaluationPace(0.0, 64), 0.0, 0.0)

    monkeypatch.setattr(recipe, "rehearse", rehearse)
    workshop.text.write_text(prose(6000))
    run, _ = composed(workshop, 0.5)
    assert tried == [0.1, 0.0]
    assert (run.train.max_steps, run.dropout.rate) == (30, 0.0)


@pytest.mark.parametrize(
    "override", ["dropout.rate=0.3", "dropout.preset=none", "dropout.sites.head=0.2", "seed=7"]
)
def test_what_is_asked_for_wins_and_is_in_the_yaml(workshop: Workshop, override: str) -> None:
    run, text = composed(workshop, 0.5, override)
    path = workshop.folder / "recipe.yaml"
    path.write_text(text)
    assert load_run([str(path)], [f"data.cache_dir={workshop.folder / 'cache'}"]) == run
    assert load_run([str(path)], [f"data.cache_dir={workshop.folder / 'cache'}", override]) == run
    assert "# as asked" in text


def test_the_decay_goes_with_the_rate_and_the_optimizer_that_are_asked_for(
    workshop: Workshop,
) -> None:
    usual, slower, adamw = (
        composed(workshop, 0.5, asked)[0].optim
        for asked in ("seed=7", "optim.lr=0.0025", "optim.name=adamw")
    )
    assert slower.weight_decay * slower.lr == pytest.approx(usual.weight_decay * usual.lr, rel=0.03)
    assert adamw.weight_decay == OptimConfig().weight_decay


def test_an_update_has_as_many_tokens_with_a_context_that_is_asked_for(workshop: Workshop) -> None:
    for context, batch_size in ((16, 128), (256, 8), (4096, 8)):
        run, _ = composed(workshop, 0.5, f"model.context_length={context}")
        assert (run.model.context_length, run.train.batch_size) == (context, batch_size)
    with pytest.raises(ConfigError, match=r"model\.context_length: "):
        composed(workshop, 0.5, "model.context_length=long")


def test_a_size_that_contradicts_what_is_asked_for_is_passed_over(workshop: Workshop) -> None:
    run, _ = composed(workshop, 0.5, "model.n_head=12")
    assert run.model.n_embd % 12 == 0
    with pytest.raises(ConfigError, match="model.n_layr: unknown key"):
        composed(workshop, 0.5, "model.n_layr=12")


def test_what_was_not_timed_is_not_done(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU `auto` would compile, which takes as long as a short run."""
    assert "compile" not in composed(workshop)[1]
    monkeypatch.setattr(recipe, "pick_device", lambda wanted: ("cuda", "there is one"))
    run, text = composed(workshop)
    assert run.compile is False
    assert "\ncompile: false  # timed without" in text
    path = workshop.folder / "recipe.yaml"
    path.write_text(text)
    assert load_run([str(path)], [f"data.cache_dir={workshop.folder / 'cache'}"]) == run


def test_a_command_counts_from_its_beginning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []

    def compose(source: Any, minutes: Any, values: Any, at: float) -> Any:
        began.append(at)
        raise DataError("enough")

    monkeypatch.setattr(recipe, "make_recipe", compose)
    before = time.perf_counter()
    CliRunner().invoke(app, ["train", "--data", str(workshop.text), "--minutes", "1"])
    assert before < began[0] < time.perf_counter()


def test_a_text_that_is_not_there_is_one_line(workshop: Workshop) -> None:
    workshop.text.unlink()
    with pytest.raises(DataError, match="No such file"):
        composed(workshop)
    workshop.text.write_text("")
    with pytest.raises(DataError, match="has no text"):
        composed(workshop)


def test_one_line_trains_on_a_text_and_goes_on(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    short = ["--set", "train.max_steps=30", "--set", "model.n_layer=1", "--set", "device=cpu"]
    command = ["train", "--data", "text.txt", "--minutes", "0.5", *short]
    result = CliRunner().invoke(app, [*command, "--verbose"])
    assert result.exit_code == 0, result.output
    assert "kind: bpe  # " in result.output
    directory = Path("runs/text")
    assert (directory / "recipe.yaml").read_text() in result.output
    assert (directory / "summary.json").is_file()
    more = ["--set", "train.max_steps=32", "--resume", "auto"]
    result = CliRunner().invoke(app, ["train", "--data", "text.txt", *more])
    assert result.exit_code == 0, result.output
    assert "resumed at step 30 of 32" in result.output
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2
    assert "or --data TEXT" in result.output


def test_samples_begin_as_the_text_does(workshop: Workshop) -> None:
    """From nothing, a model that has learned little may end the text at once."""
    begun = {
        "Once, there was a king.\nHe\n": "Once, there was a king.",
        "\n \n  A line that is longer than there is room\n": "A line that is longer than there",
        "x" * 40: "x" * 32,
        "床前明月光\n疑是地上霜": "床前明月光",
        "\x1b[31m red\nplain\n": "plain",
    }
    for text, opening in begun.items():
        assert look(workshop, text).opening == opening
    workshop.text.write_text('It\'s "quoted": yes\n' + prose())
    run, _ = composed(workshop)
    assert run.sample.prompts == ('It\'s "quoted": yes',)
    workshop.text.write_text("\n".join(NAMES))
    assert composed(workshop)[0].sample.prompts == ("",)


def test_a_command_says_what_it_will_take_and_what_was_asked(workshop: Workshop) -> None:
    options = {"minutes": 0.1, "began": NOW, "out_dir": str(workshop.folder / "out")}
    cache = f"data.cache_dir={workshop.folder / 'cache'}"
    launch = make_launch([], [cache], [str(workshop.text)], **options, resume=None)
    assert launch.promise == (6.0, "--minutes", "")
    assert launch.seconds == pytest.approx(6.0, rel=0.05)
    more = [cache, "train.max_steps=100000"]
    launch = make_launch([], more, [str(workshop.text)], **options, resume=None)
    assert launch.promise == (6.0, "--minutes", "--set train.max_steps=100000")
    assert launch.seconds is not None
    assert launch.seconds > 12


def test_a_path_that_is_not_utf_8_may_stand_beside_a_config(workshop: Workshop) -> None:
    path = workshop.folder / os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80.txt")
    workshop.text.rename(path)
    config = workshop.folder / "run.yaml"
    config.write_text("train:\n  max_steps: 3\noptim:\n  warmup_steps: 0\n")
    launch = make_launch(
        [str(config)],
        [f"data.cache_dir={workshop.folder / 'cache'}"],
        [str(path)],
        **{"minutes": None, "began": NOW, "out_dir": str(workshop.folder / "out"), "resume": None},
    )
    assert launch.run.data.source == str(path)
    assert prepare(launch.run).meta["sources"][0]["name"] == path.name
    config.write_text(dump(launch.run))
    assert load_run([str(config)]) == launch.run


def test_a_text_of_its_own_to_validate_on_goes_with_a_recipe(workshop: Workshop) -> None:
    other = workshop.folder / "valid.txt"
    other.write_text(prose(500, seed=1))
    run, text = composed(workshop, 0.5, f"data.val_source={other}")
    assert run.data.val_source == str(other)
    assert f'val_source: "{other}"  # as asked' in text
    splits = prepare(run).meta["splits"]
    assert splits["val"]["bytes"] == other.stat().st_size
    assert splits["train"]["bytes"] == workshop.text.stat().st_size

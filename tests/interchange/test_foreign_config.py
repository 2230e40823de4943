"""Configs of other projects become YAML that says the same; their files are read, never run."""

from pathlib import Path

import pytest

from gptlite.config.run import RunConfig
from gptlite.errors import ConfigError
from gptlite.interchange.foreign_config import translate
from gptlite.runs.origin import load_run

NANOGPT = r"""
# a comment
import time
out_dir = 'out-shakespeare-char'
eval_interval = 250
wandb_run_name = 'mini-gpt' + str(time.time())
pattern = '\d'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 100
print(open('x', 'w'))
"""
BOOK = """
GPT_CONFIG_124M = {
    "vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
    "drop_rate": 0.1, "qkv_bias": False,
}
OTHER_SETTINGS = {"learning_rate": 5e-4, "num_epochs": 3, "batch_size": 2, "weight_decay": 0.1}
"""


def run_of(folder: Path, text: str, name: str = "theirs.py") -> tuple[RunConfig, str]:
    (folder / name).write_text(text)
    yaml = translate(folder / name)
    (folder / "ours.yaml").write_text(yaml)
    return load_run([str(folder / "ours.yaml")]), yaml


def test_a_config_of_nanogpt(tmp_path: Path) -> None:
    run, yaml = run_of(tmp_path, NANOGPT)
    assert (run.model.n_layer, run.model.context_length, run.model.bias) == (6, 256, False)
    assert run.model.mlp == "gelu_exact"
    assert run.dropout.rates()["mlp_output"] == 0.2
    assert (run.optim.lr, run.optim.min_lr, run.optim.betas) == (1e-3, 1e-4, (0.9, 0.99))
    assert (run.train.batch_size, run.train.max_steps) == (64 * 40, 5000)
    assert (run.tokenizer.kind, run.out_dir) == ("char", "out-shakespeare-char")
    assert "# Left out: wandb_run_name, pattern." in yaml


def test_what_nanogpt_assumes_is_written_out(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, "n_layer = 2\ndecay_lr = False\n")
    assert (run.model.n_head, run.model.n_embd, run.optim.betas) == (12, 768, (0.9, 0.95))
    assert (run.optim.lr, run.optim.schedule) == (6e-4, "constant")


@pytest.mark.parametrize("name", ["theirs.py", "theirs.json"])
def test_a_dictionary_of_the_book(tmp_path: Path, name: str) -> None:
    text = BOOK
    if name.endswith("json"):
        text = BOOK.partition("= ")[2].partition("\nOTHER")[0].replace("False", "false")
        text = text.replace("false,", "false")
    run, yaml = run_of(tmp_path, text, name)
    assert (run.model.n_embd, run.model.context_length, run.model.tie_embeddings) == (
        768,
        256,
        False,
    )
    assert (run.dropout.preset, run.dropout.rate) == ("raschka", 0.1)
    assert run.train.epochs == (3 if name.endswith("py") else 10)
    assert "qkv_bias false" in yaml


def test_the_book_s_rates_by_place(tmp_path: Path) -> None:
    text = '{"emb_dim": 64, "n_heads": 4, "drop_rate_emb": 0.1, "drop_rate_attn": 0.2, '
    run, _ = run_of(tmp_path, text + '"drop_rate_shortcut": 0.3}', "theirs.json")
    rates = run.dropout.rates()
    places = ("embedding", "attention_weights", "attention_output", "mlp_output")
    assert [rates[place] for place in places] == [0.1, 0.2, 0.3, 0.3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("n_layer = ", r"not Python \(line 1: "),
        ("import os\nos.system('touch ran')\n", "no setting of nanoGPT"),
        ("n_layer = __import__('os').system('touch ran')\n", "no setting of nanoGPT"),
        ("n_layer = 'six'\n", "n_layer: expected a positive integer"),
        ("dropout = 1.5\n", "dropout.rate"),
        ("dropout = None\n", "another type"),
        ("n_layer = 'x' * 10**9\nn_head = 1/0\n", "no setting"),
        ("n_layer = " + "(" * 5000 + ")" * 5000, "nested"),
    ],
)
def test_what_is_no_config_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(text)
    with pytest.raises(ConfigError, match=told) as refused:
        translate(tmp_path / "theirs.py")
    assert "theirs.py" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.py"]

"""What nanoGPT saved is read without unpickling: the same logits, and no code of a file runs."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlite.errors import CheckpointError, ConfigError
from gptlite.interchange import torch_file
from gptlite.runs.importing import import_model
from gptlite.runs.trained import load_trained

CHARACTERS = "\n abcdefgh"
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}


class Twin(nn.Module):
    """nanoGPT's arithmetic under nanoGPT's names."""

    def __init__(self, vocab_size: int, bias: bool) -> None:
        super().__init__()

        def block() -> nn.ModuleDict:
            attn = {"c_attn": nn.Linear(32, 96, bias), "c_proj": nn.Linear(32, 32, bias)}
            mlp = {"c_fc": nn.Linear(32, 128, bias), "c_proj": nn.Linear(128, 32, bias)}
            norms = {name: nn.LayerNorm(32, bias=bias) for name in ("ln_1", "ln_2")}
            return nn.ModuleDict({**norms, "attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, 32),
                "wpe": nn.Embedding(16, 32),
                "h": nn.ModuleList([block() for _ in range(2)]),
                "ln_f": nn.LayerNorm(32, bias=bias),
            }
        )
        self.lm_head = nn.Linear(32, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        t: Any = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1]))
        for h in t["h"]:
            q, k, v = (
                part.view(*ids.shape, 2, 16).transpose(1, 2)
                for part in h["attn"]["c_attn"](h["ln_1"](x)).split(32, dim=2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + h["attn"]["c_proj"](y.transpose(1, 2).reshape(*ids.shape, 32))
            x = x + h["mlp"]["c_proj"](F.gelu(h["mlp"]["c_fc"](h["ln_2"](x))))
        logits: Tensor = self.lm_head(t["ln_f"](x))
        return logits


def saved(folder: Path, *, vocab_size: int, bias: bool, prefix: str = "") -> tuple[Twin, Path]:
    """A model and the file that nanoGPT's train.py would write of it."""
    torch.manual_seed(1)
    twin = Twin(vocab_size, bias)
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.AdamW(twin.parameters())
    twin(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in twin.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**SIZES, "bias": bias, "vocab_size": vocab_size, "dropout": 0.2},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "compile": False, "learning_rate": 1e-3},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    return twin.eval(), folder / "ckpt.pt"


def write_meta(path: Path) -> Path:
    itos = dict(enumerate(CHARACTERS))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    path.write_bytes(pickle.dumps(meta))
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_gives_its_logits(tmp_path: Path, bias: bool, prefix: str) -> None:
    twin, path = saved(tmp_path, vocab_size=10, bias=bias, prefix=prefix)
    meta = write_meta(tmp_path / "characters.pkl")
    back = load_trained(import_model(str(path), tmp_path / "run", meta), "best")
    assert back.run.model.bias == bias
    assert back.run.dropout.rates()["mlp_output"] == 0.2
    assert back.tokenizer.encode("a\nb") == [2, 0, 3]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert (back.model(ids) - twin(ids)).abs().max() < 1e-5


def test_a_padded_vocabulary_of_gpt2_is_cut_and_said(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptlite.interchange import nanogpt

    monkeypatch.setattr(nanogpt, "GPT2_VOCABULARIES", (300, 320))
    bytes_ = nanogpt.CharTokenizer("".join(map(chr, range(300))), eot=False, unknown="error")
    monkeypatch.setattr(nanogpt, "load_pretrained", lambda name: bytes_)
    twin, path = saved(tmp_path, vocab_size=320, bias=False)
    back = load_trained(import_model(str(path), tmp_path / "run", None), "best")
    assert "20 of 320 rows left out" in capsys.readouterr().err
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert (back.model(ids) - twin(ids)[..., :300]).abs().max() < 1e-5


def test_a_meta_beside_the_checkpoint_is_found_and_a_missing_one_is_asked_for(
    tmp_path: Path,
) -> None:
    _, path = saved(tmp_path, vocab_size=10, bias=True)
    with pytest.raises(ConfigError, match="--meta data/NAME/meta.pkl"):
        import_model(str(path), tmp_path / "run", None)
    write_meta(tmp_path / "meta.pkl")
    assert load_trained(import_model(str(path), tmp_path / "run", None), "best")
    with pytest.raises(ConfigError, match="contains a run"):
        import_model(str(path), tmp_path / "run", None)


@pytest.mark.parametrize("vocab_size", [7, 12])
def test_a_meta_of_other_data_is_refused(tmp_path: Path, vocab_size: int) -> None:
    """It would cut rows of the embedding, or lack them."""
    _, path = saved(tmp_path, vocab_size=vocab_size, bias=True)
    meta = write_meta(tmp_path / "other.pkl")
    with pytest.raises(
        ConfigError, match=f"has 10 characters, but .* a vocabulary of {vocab_size}"
    ):
        import_model(str(path), tmp_path / "run", meta)
    meta.write_bytes(pickle.dumps({"itos": {0: "ab", **dict.fromkeys(range(1, vocab_size), "")}}))
    with pytest.raises(CheckpointError, match="not one character for each id"):
        import_model(str(path), tmp_path / "run", meta)


class Evil:
    """What a pickle can do to who loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "it ran"))


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    trap, target = Evil(tmp_path / "trap"), tmp_path / "trap"
    plain = pickle.loads(pickle.dumps(trap))  # the trap works
    assert (plain, target.read_text()) == (6, "it ran")
    target.unlink()
    torch.save({"model": trap, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of nanoGPT"):
        import_model(str(tmp_path / "ckpt.pt"), tmp_path / "run", None)
    for protocol in range(2, 6):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": trap}, protocol))
        assert isinstance(torch_file.read_pickle(tmp_path / "meta.pkl")["itos"], torch_file.Opaque)
    assert not target.exists()


def test_every_tensor_of_a_file_is_what_torch_reads(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    value = {
        "part": base[3:15].view(3, 4).T,
        "whole": base,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "parameter": nn.Parameter(torch.ones(2)),
        "list": [1, 2.5, "x", None, True, (1, 2, 3, 4), {"a": []}],
        "empty": torch.zeros(0, 3),
        "large": 2**70,
    }
    torch.save(value, tmp_path / "f.pt")
    found = torch_file.read_torch_file(tmp_path / "f.pt")
    assert found["list"] == value["list"]
    assert found["large"] == 2**70
    for name, tensor in value.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(found[name], tensor.detach()), name
            assert found[name].dtype == tensor.dtype


def damaged(path: Path) -> dict[str, bytes]:
    """Files that are no whole checkpoint, made of one that is."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}

    def again(change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        with zipfile.ZipFile(path.with_name("again"), "w", compression) as archive:
            for name, raw in {**inside, **change}.items():
                archive.writestr(name, raw)
        return path.with_name("again").read_bytes()

    program = next(name for name in inside if name.endswith("data.pkl"))
    numbers = next(name for name in inside if "/data/" in name)
    return {
        "empty": b"",
        "no zip": b"\x80\x02}q\x00.",
        "cut": whole[: len(whole) // 2],
        "compressed": again({}, zipfile.ZIP_DEFLATED),
        "program cut": again({program: inside[program][:-20]}),
        "program is text": again({program: b"hello"}),
        "no stack": again({program: b"\x80\x02u."}),
        "numbers cut": again({numbers: inside[numbers][:-4]}),
        "numbers odd": again({numbers: inside[numbers][:-1]}),
    }


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    _, path = saved(tmp_path, vocab_size=10, bias=True)
    write_meta(tmp_path / "meta.pkl")
    for what, raw in damaged(path).items():
        path.write_bytes(raw)
        with pytest.raises(CheckpointError) as refused:
            import_model(str(path), tmp_path / "run", None)
        assert len(refused.value.problems) == 1, what
        assert "\n" not in str(refused.value), what
        assert str(path) in str(refused.value), what
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02K\x01.")
    _, path = saved(tmp_path, vocab_size=10, bias=True)
    with pytest.raises(CheckpointError, match="not a meta.pkl"):
        import_model(str(path), tmp_path / "run", None)


def test_a_tensor_that_swells_is_refused(tmp_path: Path) -> None:
    """A stride of nothing makes any size of one number."""
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="outside of its numbers"):
        torch_file.read_torch_file(tmp_path / "f.pt")

"""GGUF: what the file says, what it holds, and what cannot be in one. llama.cpp's own package reads
it back here; test_llama_cpp.py has llama.cpp itself."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop
from exports import LEARNED, OURS, RECIPE, SHAPES, WHOLE, make_run
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.config.run import ModelConfig
from gptlite.core.weights import model_tensors
from gptlite.data.marks import Marks
from gptlite.data.tokenizers import BPETokenizer, ByteTokenizer
from gptlite.errors import ConfigError, MissingPackages, UserError
from gptlite.interchange import gguf_tokenizer
from gptlite.interchange.families import describe_export
from gptlite.runs.export import prepare_gguf, save
from gptlite.runs.trained import Trained, load_trained

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


def is_held(shape: dict[str, Any]) -> bool:
    return describe_export(ModelConfig.model_validate({"n_embd": 64} | shape)).endswith("as GGUF")


HELD = [name for name, shape in SHAPES.items() if is_held(shape)]
REFUSED = [name for name in SHAPES if name not in HELD]


def exported(workshop: Workshop, type_: str = "f32", **sections: Any) -> tuple[Trained, Any]:
    """A run, and its file as llama.cpp's package reads it."""
    trained = load_trained(make_run(workshop, **sections), "best")
    save(prepare_gguf(trained, type_, "mine"), workshop.folder / "gguf")
    return trained, gguf.GGUFReader(workshop.folder / "gguf" / "model.gguf")


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def numbers(reader: Any) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("shape", HELD)
def test_the_file_has_the_names_and_the_numbers(workshop: Workshop, shape: str) -> None:
    trained, reader = exported(workshop, model={"n_head": 4} | SHAPES[shape])
    model, there = trained.run.model, numbers(reader)
    family = field(reader, "general.architecture")
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    in_blocks = {f"blk.{{bid}}.{name.split('.')[2]}" if "blk." in name else name for name in there}
    assert {name.rpartition(".")[0] if "blk" not in name else name for name in in_blocks} <= known
    assert field(reader, f"{family}.context_length") == model.context_length
    assert field(reader, f"{family}.attention.head_count_kv") == model.kv_heads
    ours = model_tensors(trained.model)
    assert torch.equal(there["token_embd.weight"], ours["token_embedding.weight"])
    assert torch.equal(there["blk.1.ffn_down.weight"], ours["blocks.1.mlp.down.weight"])
    assert ("output.weight" in there) == (not model.tie_embeddings or family == "apertus")


@pytest.mark.parametrize("shape", ["llama, grouped keys", "arcee"])
def test_queries_and_keys_turn_by_neighbours(workshop: Workshop, shape: str) -> None:
    trained, reader = exported(workshop, model={"n_head": 4} | SHAPES[shape])
    ours = model_tensors(trained.model)["blocks.0.attention.qkv.weight"]
    model, half = trained.run.model, trained.run.model.head_width // 2
    queries = numbers(reader)["blk.0.attn_q.weight"]
    for head in range(model.n_head):
        for pair in range(half):
            row = head * model.head_width
            assert torch.equal(queries[row + 2 * pair], ours[row + pair])
            assert torch.equal(queries[row + 2 * pair + 1], ours[row + half + pair])


@pytest.mark.parametrize(("type_", "most"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_are_rounded_and_the_rest_is_not(
    workshop: Workshop, type_: str, most: float
) -> None:
    model = {**RECIPE, "n_embd": 64}
    trained, reader = exported(workshop, type_, model=model)
    whole = prepare_gguf(trained, "f32", "mine").write_tensors.keywords["tensors"]  # type: ignore[attr-defined]
    for name, tensor in numbers(reader).items():
        error = (tensor - whole[name]).abs().max() / whole[name].abs().max()
        assert error <= most, name
        assert (error > 0) == (tensor.dim() == 2), name
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {type_.upper(), "F32"}


def test_learned_positions_stay_whole(workshop: Workshop) -> None:
    trained, reader = exported(workshop, "f16")
    ours = model_tensors(trained.model)["position_embedding.weight"]
    assert torch.equal(numbers(reader)["position_embd.weight"], ours)


def test_it_carries_what_the_run_is_and_how_it_samples(workshop: Workshop) -> None:
    sample = {"temperature": 0.7, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2}
    trained, reader = exported(workshop, sample=sample)
    assert field(reader, "general.name") == "mine"
    assert "repetition_penalty: 1.2" in field(reader, "gptlite.config")
    assert field(reader, "general.sampling.temp") == pytest.approx(0.7)
    lines = (workshop.folder / "gguf" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    said = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER "))
    length = trained.run.model.context_length
    assert (said["num_ctx"], said["temperature"], said["top_k"]) == (str(length), "0.7", "40")
    assert (said["top_p"], said["min_p"], said["repeat_penalty"]) == ("1.0", "0.05", "1.2")
    assert trained.state.data_digest in (workshop.folder / "gguf" / "README.md").read_text()


@pytest.mark.parametrize("shape", REFUSED)
def test_a_model_that_llama_cpp_cannot_compute_is_refused_by_field(
    workshop: Workshop, shape: str
) -> None:
    trained = load_trained(make_run(workshop, model={"n_head": 4} | SHAPES[shape]), "best")
    with pytest.raises(ConfigError, match=r"^model\.\w+: \w+ cannot be exported as GGUF"):
        prepare_gguf(trained, "f32", "mine")


def test_a_width_that_a_type_does_not_allow_is_refused(workshop: Workshop) -> None:
    trained = load_trained(make_run(workshop, model={"n_embd": 48, "n_head": 3}), "best")
    with pytest.raises(ConfigError) as refused:
        prepare_gguf(trained, "q8_0", "mine")
    assert str(refused.value) == (
        "--type q8_0: token_embd.weight has rows of 48 numbers, which are no multiple of 32; "
        "take f16, bf16 or f32"
    )


def test_a_weight_that_float16_does_not_reach_is_refused(workshop: Workshop) -> None:
    trained = load_trained(make_run(workshop), "best")
    with torch.no_grad():
        trained.model.blocks[0].mlp.up.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match="ffn_up.weight has weights above 65,504"):
        prepare_gguf(trained, "f16", "mine")
    prepare_gguf(trained, "bf16", "mine")


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (OURS["char, replace"], "no vocabulary of characters such as 'é' without an end-of-text"),
        (OURS["bpe, a whole word"], "no merge makes 'Ġxyz', so llama.cpp would not find it"),
        (OURS["bpe, cl100k's words"], "cuts words in a way that llama.cpp has no name for"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_hold_is_refused(tokenizer: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        gguf_tokenizer.make_vocabulary(tokenizer)


def test_a_text_never_ends_at_a_token_of_text() -> None:
    """llama.cpp takes token 11 where a file names none."""
    byte = gguf_tokenizer.make_vocabulary(ByteTokenizer(eot=False))
    assert byte.ends == [0xFF]  # a byte of no text
    plain = BPETokenizer("bpe", "x", LEARNED.pattern, WHOLE, None, Marks({"<s>": 400}))
    with pytest.raises(ConfigError):
        gguf_tokenizer.make_vocabulary(plain)
    whole = {token: rank for token, rank in WHOLE.items() if token != b" xyz"}
    plain = BPETokenizer("bpe", "x", LEARNED.pattern, whole, None, Marks({"<s>": 400}))
    made = gguf_tokenizer.make_vocabulary(plain)
    assert made.ends == [plain.ranks[b"\xff"]]
    assert (made.tokens[400], made.types[400]) == ("<s>", gguf_tokenizer.CONTROL)
    assert made.tokens[399] == "<|unused 399|>"
    assert len(set(made.tokens)) == len(made.tokens) == 401


def test_tokens_that_never_come_are_said(workshop: Workshop) -> None:
    trained = load_trained(make_run(workshop), "best")
    save(prepare_gguf(replace(trained, unseen=(1, 3)), "f32", "mine"), workshop.folder / "gguf")
    reader = gguf.GGUFReader(workshop.folder / "gguf" / "model.gguf")
    assert field(reader, "tokenizer.ggml.suppress_tokens") == [1, 3]


def test_documents_begin_with_their_token(workshop: Workshop) -> None:
    (workshop.folder / "two.jsonl").write_text('{"text": "one two"}\n{"text": "three four"}\n' * 99)
    source = {"source": str(workshop.folder / "two.jsonl"), "layout": "documents"}
    trained, reader = exported(workshop, data=source)
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.bos_token_id") == trained.tokenizer.eot
    assert field(reader, "tokenizer.ggml.eos_token_id") == trained.tokenizer.eot


def test_without_the_package_it_says_how_to_get_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_trained(make_run(workshop), "best")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackages, match=r"^--to gguf needs gguf: pip install gguf$"):
        prepare_gguf(trained, "f32", "mine")


def test_nothing_is_left_of_a_file_that_was_not_finished(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_trained(make_run(workshop), "best")
    made, before = prepare_gguf(trained, "f32", "mine"), {*workshop.folder.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(UserError, match="No space left"):
        save(made, workshop.folder / "gguf")
    assert {*workshop.folder.iterdir()} == before


def cli(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_or_says_why_not(workshop: Workshop) -> None:
    run, out = str(make_run(workshop)), str(workshop.folder / "gguf")
    gone = ("export", "--run", run, "--to", "gguf", "--out", out)
    assert cli(*gone, "--dry-run")[1].startswith("---\nlibrary_name: gguf\n")
    assert not Path(out).exists()
    assert cli(*gone, "--type", "f16") == (0, f"{out}\n", "")
    assert sorted(p.name for p in Path(out).iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    assert cli(*gone)[::2] == (2, f"--out {out}: is there already; give a new directory\n")
    code, _, told = cli("export", "--run", run, "--out", f"{out}2", "--type", "f16")
    assert (code, told) == (2, "--type f16: only with --to gguf\n")


def test_pushing_takes_a_name_and_a_word_for_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[str] = []

    class Hub:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append(f"create {name}")

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            assert (folder_path / "config.json").is_file()
            calls.append(f"upload {repo_id}")
            if repo_id == "me/offline":
                raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run, out = str(make_run(workshop)), workshop.folder
    assert cli("export", "--run", run, "--out", str(out / "a"))[0] == 0
    assert (
        cli("export", "--run", run, "--out", str(out / "b"), "--push", "me/x", "--dry-run")[0] == 0
    )
    assert calls == []
    code, told, _ = cli("export", "--run", run, "--out", str(out / "c"), "--push", "me/x")
    assert (code, told.splitlines()[-1]) == (0, "https://huggingface.co/me/x")
    assert calls == ["create me/x", "upload me/x"]
    code, _, told = cli("export", "--run", run, "--out", str(out / "d"), "--push", "me/offline")
    assert (code, told.count("\n")) == (2, 1)
    assert "ConnectionError: no route to host; the directory is written" in told
    code, _, told = cli("export", "--run", run, "--out", str(out / "e"), "--push", "a b/c")
    assert (code, told.count("\n")) == (2, 1)
    assert not (out / "e").exists()

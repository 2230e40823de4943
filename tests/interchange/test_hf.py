"""Hugging Face in and out: the same logits, the same text, the same ids, and nothing lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, prose
from exports import (
    CHARACTERS,
    LEARNED,
    LLAMA,
    OURS,
    RECIPE,
    SHAPES,
    make_run,
    some_ids,
    strange_texts,
)
from safetensors.torch import save_file

from gptlite import storage
from gptlite.core import tensor_files
from gptlite.core.generate import Generation
from gptlite.core.weights import model_tensors
from gptlite.data.tokenizers import (
    train_bpe,
)
from gptlite.errors import CheckpointError, ConfigError, DataError, UserError
from gptlite.interchange import foreign_tokenizer, hf_tokenizer
from gptlite.runs.export import prepare_hf, save
from gptlite.runs.importing import import_model
from gptlite.runs.trained import Trained, load_trained


def exported(workshop: Workshop, **sections: Any) -> tuple[Trained, Path]:
    trained = load_trained(make_run(workshop, **sections), "best")
    save(prepare_hf(trained), workshop.folder / "hf")
    return trained, workshop.folder / "hf"


GONE = object()


def write_over(path: Path, change: dict[str, Any]) -> None:
    """Fields of a JSON file changed, or taken out."""
    whole = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: v for name, v in whole.items() if v is not GONE}))


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_gives_the_same_logits_and_the_same_text(
    workshop: Workshop, shape: str
) -> None:
    trained, folder = exported(workshop, model={"context_length": 256, "n_head": 4} | SHAPES[shape])
    model, ids = theirs(folder), some_ids(trained)
    with torch.no_grad():
        ours = trained.model(ids)
        assert (model(ids).logits - ours).abs().max() <= 1e-5
    prompt = "The of and"
    greedy = trained.run.sample.model_copy(update={"temperature": 0.0, "max_new_tokens": 200})
    (result,) = Generation(trained.model, trained.tokenizer, [prompt], greedy, seed=0).results()
    start = torch.tensor([trained.tokenizer.encode(prompt)])
    made = model.generate(start, max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert len(made[0]) == start.shape[1] + 200
    assert trained.tokenizer.encode(prompt + result["text"]) == made[0].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_out_in_and_out_again_loses_nothing(workshop: Workshop, shape: str) -> None:
    dropout = {"preset": "gpt2", "rate": 0.2, "sites": {"head": 0.1}}
    trained, folder = exported(workshop, model=SHAPES[shape], dropout=dropout)
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert back.run.model == trained.run.model
    assert back.run.dropout == trained.run.dropout
    assert back.tokenizer.to_json() == trained.tokenizer.to_json()
    ours, again = model_tensors(trained.model), model_tensors(back.model)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    save(prepare_hf(back), workshop.folder / "hf2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (workshop.folder / "hf2" / name).read_bytes() == (folder / name).read_bytes(), name


def test_tokens_that_never_come_go_along(workshop: Workshop) -> None:
    trained, folder = exported(workshop)
    assert "suppress_tokens" not in json.loads((folder / "generation_config.json").read_text())
    never = replace(trained, unseen=(1, 3))
    save(prepare_hf(never), workshop.folder / "hf2")
    back = load_trained(
        import_model(str(workshop.folder / "hf2"), workshop.folder / "b", None), "best"
    )
    assert back.unseen == (1, 3)
    save(prepare_hf(back), workshop.folder / "hf3")
    said = [(workshop.folder / f / "generation_config.json").read_text() for f in ("hf2", "hf3")]
    assert said[0] == said[1]
    model = theirs(workshop.folder / "hf2")
    start = torch.zeros(64, 1, dtype=torch.long)
    made = model.generate(start, max_new_tokens=8, do_sample=True, temperature=9.0)
    assert not {1, 3}.intersection(made.flatten().tolist())


def test_rates_are_carried_and_what_has_no_word_is_told(workshop: Workshop) -> None:
    dropout = {"preset": "none", "sites": {"embedding": 0.1, "attention_weights": 0.2}}
    dropout["sites"] |= {"attention_output": 0.3, "mlp_output": 0.4, "head": 0.05}  # type: ignore[operator]
    trained = load_trained(make_run(workshop, dropout=dropout), "best")
    made = prepare_hf(trained)
    save(made, workshop.folder / "hf")
    config = json.loads((workshop.folder / "hf" / "config.json").read_text())
    rates = {name: config[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    assert rates == {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
    assert made.note == (
        "config.json has no word for this dropout: head 0.05, mlp_output 0.4 (one rate for "
        "attention_output and mlp_output)"
    )
    card = (workshop.folder / "hf" / "README.md").read_text()
    assert "head 0.05" in card
    assert trained.state.data_digest in card


def test_what_was_changed_elsewhere_counts_more_than_what_we_wrote(workshop: Workshop) -> None:
    """Our own sections in config.json are kept for what it has no word for, not against it."""
    dropout = {"preset": "gpt2", "rate": 0.2, "sites": {"head": 0.1}}
    _, folder = exported(workshop, model={"bias": False}, dropout=dropout)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resid_pdrop": 0.5}))
    weights = tensor_files.read_tensors(folder / "model.safetensors")
    weights["transformer.h.0.ln_1.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert back.run.model.bias
    rates = back.run.dropout.rates()
    assert (rates["mlp_output"], rates["embedding"], rates["head"]) == (0.5, 0.2, 0.0)
    ids = some_ids(back)
    with torch.no_grad():
        assert (theirs(folder)(ids).logits - back.model(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ({"qk_norm": True}, ["model.qk_norm"]),
        ({"n_kv_head": 1}, ["model.n_kv_head"]),
        ({"norm": "rmsnorm"}, ["model.norm"]),
        ({"head_dim": 12}, ["model.head_dim"]),
        ({"position": "rope", "mlp": "swiglu"}, ["model.norm"]),
        ({**RECIPE, "bias": True}, ["model.bias"]),
        ({"norm": "rmsnorm", "qk_norm": True, "bias": False}, ["model.position"]),
    ],
)
def test_what_has_no_equivalent_is_refused_by_name(
    workshop: Workshop, model: dict[str, Any], fields: list[str]
) -> None:
    trained = load_trained(make_run(workshop, model=model), "best")
    with pytest.raises(ConfigError) as refused:
        save(prepare_hf(trained), workshop.folder / "hf")
    assert [problem.partition(":")[0] for problem in refused.value.problems] == fields
    assert not (workshop.folder / "hf").exists()


@pytest.mark.parametrize(
    ("shape", "change", "told"),
    [
        ("gpt2", {"activation_function": "silu"}, "activation_function silu"),
        ("gpt2", {"n_inner": 96}, "6 weights do not fit this model: blocks.0.mlp.down"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"model_type": "bloom"}, "model_type 'bloom'; gptlite reads gpt2, llama, qwen3"),
        ("gpt2", {"n_embd": None}, "n_embd"),
        ("gpt2", {"n_head": 5}, "5 heads (5 of keys and values) do not divide"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ("llama", {"intermediate_size": 100}, "intermediate_size mean [100, 100] rows"),
        ("llama", {"head_dim": 32}, "head_dim or intermediate_size mean [64, 64, 64] rows"),
        ("apertus", {"rope_parameters": GONE, "rope_theta": GONE}, "rope_type 'llama3', the def"),
        ("apertus", {"hidden_act": GONE}, "hidden_act xielu"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("starcoder2", {"sliding_window": 64}, "sliding_window 64"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"mlp_bias": True}, "attention_bias False with mlp_bias True"),
        ("llama", {"intermediate_size": GONE}, "intermediate_size mean [11008, 11008] rows"),
        ("llama", {"attention_bias": True}, "attention_bias True with mlp_bias False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear'",
        ),
        ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon None"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop 1.5"),
        ("gpt2", {"vocab_size": 7}, "vocab_size of config.json is 7"),
        ("gpt2", {"n_positions": GONE}, "position_embedding.weight"),
        ("llama", {"hidden_size": "64"}, "model.n_embd would be '64'"),
    ],
)
def test_a_foreign_model_that_fits_nothing_here_is_refused_by_field(
    workshop: Workshop, shape: str, change: dict[str, Any], told: str
) -> None:
    _, folder = exported(workshop, model=SHAPES[shape])
    path = folder / "config.json"
    write_over(path, change)
    with pytest.raises(UserError) as refused:
        import_model(str(folder), workshop.folder / "back", None)
    assert told in str(refused.value)
    assert str(path.parent) in str(refused.value)
    assert not (workshop.folder / "back").exists()


@pytest.mark.parametrize(
    ("shape", "change", "field", "value"),
    [
        ("gpt2", {"layer_norm_epsilon": 1e-2}, "norm_eps", 1e-2),
        ("llama", {"rope_parameters": GONE, "rope_theta": 500.0}, "rope_theta", 500.0),
        (
            "llama",
            {"rope_theta": GONE, "rope_parameters": {"rope_theta": 50.0}},
            "rope_theta",
            50.0,
        ),
        ("llama", {"rms_norm_eps": 1e-2}, "norm_eps", 1e-2),
        ("llama", {"rms_norm_eps": GONE}, "norm_eps", 1e-6),
        ("qwen3", {"rms_norm_eps": 1e-2}, "norm_eps", 1e-2),
        ("starcoder2", {"norm_epsilon": 1e-2}, "norm_eps", 1e-2),
        ("apertus", {"rms_norm_eps": 1e-2}, "norm_eps", 1e-2),
    ],
)
def test_what_a_file_says_or_its_family_means_is_taken(
    workshop: Workshop, shape: str, change: dict[str, Any], field: str, value: float
) -> None:
    _, folder = exported(workshop, model=SHAPES[shape])
    write_over(folder / "config.json", change)
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert getattr(back.run.model, field) == value
    ids = some_ids(back)
    with torch.no_grad():
        assert (theirs(folder)(ids).logits - back.model(ids)).abs().max() <= 1e-5


PUBLISHED: dict[str, dict[str, Any]] = {
    "TinyLlama": {
        **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 22},
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    "SmolLM": {
        **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30},
        **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28},
        **{"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
        **{"head_dim": 128, "tie_word_embeddings": True},
    },
}
"""Sizes of models that people have, as their config.json says them, but for the vocabulary."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_published_models_come_in_and_go_out(workshop: Workshop, name: str) -> None:
    """One of their layers: all would take gigabytes, and are the same."""
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    _, folder = exported(workshop)
    tokenizer = workshop.files().tokenizer
    sizes = {**PUBLISHED[name], "num_hidden_layers": 1, "vocab_size": tokenizer.vocab_size}
    config = transformers.AutoConfig.for_model(**sizes, bos_token_id=None, eos_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    ids = torch.arange(32)[None] % tokenizer.vocab_size
    with torch.no_grad():
        assert (theirs(folder)(ids).logits - back.model(ids)).abs().max() <= 1e-5
    save(prepare_hf(back), workshop.folder / "out")
    said = json.loads((workshop.folder / "out" / "config.json").read_text())
    rope = said["rope_parameters"]["rope_theta"]
    assert {name: {**said, "rope_theta": rope}[name] for name in sizes} == sizes


def test_weights_that_are_missing_too_many_or_of_another_shape_are_refused(
    workshop: Workshop,
) -> None:
    _, folder = exported(workshop)
    path = folder / "model.safetensors"
    whole = tensor_files.read_tensors(path)
    for change, told in (
        ({"transformer.wpe.weight": None}, "position_embedding.weight"),
        ({"transformer.h.9.ln_1.bias": torch.zeros(32)}, "transformer.h.9.ln_1.bias"),
        ({"transformer.wpe.weight": torch.zeros(7, 32)}, "7 rows, but n_positions of config.json"),
        ({"transformer.wte.weight": torch.zeros(3, 32)}, "3 rows, but vocab_size of config.json"),
        ({"lm_head.weight": torch.zeros(99, 32)}, "lm_head.weight differs"),
    ):
        tensors = {**whole, **change}
        save_file({name: t for name, t in tensors.items() if t is not None}, path)
        with pytest.raises(CheckpointError, match=told) as refused:
            import_model(str(folder), workshop.folder / "back", None)
        assert str(folder) in str(refused.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        import_model(str(folder), workshop.folder / "back", None)


def test_weights_in_several_files_and_with_other_prefixes_are_read(workshop: Workshop) -> None:
    trained, folder = exported(workshop)
    whole = tensor_files.read_tensors(folder / "model.safetensors")
    whole = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    whole["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the causal mask of OpenAI's files
    names = sorted(whole)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: whole[name] for name in inside}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    ours, again = model_tensors(trained.model), model_tensors(back.model)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each of OURS as AutoTokenizer loads it."""
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    loaded = {}
    for name, tokenizer in OURS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        for file, value in hf_tokenizer.make_files(tokenizer, 64).items():
            storage.write_json(folder / file, value)
        loaded[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("name", OURS)
def test_ids_are_equal_on_ten_thousand_texts(hugging_face: dict[str, Any], name: str) -> None:
    texts = [*strange_texts(10_000), "12345", "1234567", "xyz xyz"]
    ours, theirs = OURS[name], hugging_face[name]
    ids = [ours.encode(text) for text in texts]
    found = theirs(texts)["input_ids"]
    assert [text for text, a, b in zip(texts, ids, found, strict=True) if a != b] == []
    if name.startswith(("byte", "bpe")):
        assert theirs.batch_decode(ids[:500]) == texts[:500]


@pytest.mark.parametrize("name", OURS)
def test_a_tokenizer_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    for file, value in hf_tokenizer.make_files(OURS[name], 64).items():
        storage.write_json(tmp_path / file, value)
    back, ours = foreign_tokenizer.import_tokenizer(tmp_path), OURS[name]
    for text in (prose(50), "é漢 '12345'\n\n x", ""):
        known = "".join(c for c in text if c in CHARACTERS)
        assert back.encode(known) == ours.encode(known)
    assert (back.vocab_size, back.eot, back.kind) == (ours.vocab_size, ours.eot, ours.kind)
    again = hf_tokenizer.make_files(back, 64)
    assert again == json.loads(json.dumps(hf_tokenizer.make_files(ours, 64)))


def test_a_tokenizer_of_another_make_is_refused(tmp_path: Path) -> None:
    whole = json.loads(json.dumps(hf_tokenizer.tokenizer_json(LEARNED)))
    path = tmp_path / "tokenizer.json"
    wordpiece = {**whole["model"], "type": "WordPiece"}
    for change in (
        {"model": wordpiece},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"model": 3},
        {"model": {"type": "BPE", "vocab": {"a": -1}}},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises((ConfigError, DataError)) as refused:
            foreign_tokenizer.import_tokenizer(tmp_path)
        assert str(path) in str(refused.value)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError):
        foreign_tokenizer.import_tokenizer(tmp_path)


def test_links_as_the_hub_s_cache_has_them_are_followed(workshop: Workshop) -> None:
    trained, folder = exported(workshop)
    snapshot = workshop.folder / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(workshop.folder / f"blob{number}")
        (snapshot / file.name).symlink_to(blob)
    back = load_trained(import_model(str(snapshot), workshop.folder / "back", None), "best")
    assert back.run.model == trained.run.model


def test_merges_in_another_order_than_ids_are_refused(tmp_path: Path) -> None:
    """Ranks are all that tiktoken knows: it would cut words otherwise than the file says."""
    whole = json.loads(json.dumps(hf_tokenizer.tokenizer_json(LEARNED)))
    path = tmp_path / "tokenizer.json"
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    path.write_text(json.dumps(whole))
    assert foreign_tokenizer.import_tokenizer(tmp_path).encode("the of") == LEARNED.encode("the of")
    whole["model"]["merges"][:2] = whole["model"]["merges"][1::-1]
    path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="not in the order of its ids"):
        foreign_tokenizer.import_tokenizer(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_transformers_itself_saves_is_read(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    size = {"vocab_size": 301, "bos_token_id": 300, "eos_token_id": 300}
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24, **size)
    else:
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"hidden_size": 48, "intermediate_size": 128, "max_position_embeddings": 24}
        config = transformers.LlamaConfig(**shape, rms_norm_eps=1e-5, **size)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "hf")
    text = train_bpe([prose()], 301)
    for file, value in hf_tokenizer.make_files(text, 24).items():
        storage.write_json(tmp_path / "hf" / file, value)
    back = load_trained(import_model(str(tmp_path / "hf"), tmp_path / "run", None), "best")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert (back.model(ids) - model(ids).logits).abs().max() <= 1e-5
    assert back.run.dropout.rates()["embedding"] == (0.1 if family == "gpt2" else 0.0)


def test_a_silent_config_means_what_its_family_does(workshop: Workshop) -> None:
    """Rates of 0.1 and a table of 1,024 positions, unless the file says otherwise."""
    _, folder = exported(workshop, model={"context_length": 1024, "n_layer": 1})
    names = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "activation_function", "n_positions")
    gone = (*names, "layer_norm_epsilon", "tie_word_embeddings", "n_inner", "gptlite", "n_ctx")
    write_over(folder / "config.json", dict.fromkeys(gone, GONE))
    write_over(folder / "config.json", {"n_embd": GONE, "hidden_size": 32})
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert set(back.run.dropout.rates().values()) == {0.0, 0.1}
    ids = some_ids(back)
    with torch.no_grad():
        assert (theirs(folder)(ids).logits - back.model(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_bare_llama_is_read_if_it_has_a_head(workshop: Workshop, tied: bool) -> None:
    shape = {**LLAMA, "bias": False, "tie_embeddings": tied}
    trained, folder = exported(workshop, model=shape)
    path = folder / "model.safetensors"
    whole = tensor_files.read_tensors(path)
    whole.pop("lm_head.weight", None)
    save_file({name.removeprefix("model."): tensor for name, tensor in whole.items()}, path)
    if not tied:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing, and tie_word"):
            import_model(str(folder), workshop.folder / "back", None)
        return
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    ids = some_ids(back)
    with torch.no_grad():
        assert (trained.model(ids) - back.model(ids)).abs().max() <= 1e-5


def test_weights_that_would_be_dropped_or_cut_are_said(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, folder = exported(workshop, model={**LLAMA, "bias": False})
    path, n = folder / "model.safetensors", trained.tokenizer.vocab_size
    whole = tensor_files.read_tensors(path)
    attention = "model.layers.0.self_attn"
    k = whole[f"{attention}.k_proj.weight"]
    for change, told in (
        ({f"{attention}.q_proj.bias": torch.ones(32)}, "weights of no use here"),
        (
            {
                f"{attention}.k_proj.weight": k[:16],
                f"{attention}.v_proj.weight": torch.cat([k, k[:16]]),
            },
            "rows",
        ),
        ({"layers.0.input_layernorm.weight": torch.ones(32)}, "two weights of one name"),
    ):
        save_file({name: t.contiguous() for name, t in {**whole, **change}.items()}, path)
        with pytest.raises(CheckpointError, match=told):
            import_model(str(folder), workshop.folder / "back", None)
    table = whole["model.embed_tokens.weight"]
    save_file({**whole, "model.embed_tokens.weight": torch.cat([table, table[:5]])}, path)
    write_over(folder / "config.json", {"vocab_size": n + 5})
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert f"5 of {n + 5} rows left out" in capsys.readouterr().err
    ids = some_ids(back)
    with torch.no_grad():
        assert (theirs(folder)(ids).logits[..., :n] - back.model(ids)).abs().max() <= 1e-5


KINDS: dict[str, dict[str, Any]] = {
    "char": {"kind": "char"},
    "byte": {"kind": "byte"},
    "bpe": {"kind": "bpe", "vocab_size": 300},
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_there_and_back_as_here(workshop: Workshop, kind: str) -> None:
    """Each row begins with the end of the one before; batches are padded."""
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    trained, folder = exported(workshop, data={"layout": "documents"}, tokenizer=KINDS[kind])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts, greedy = ["an", "the of"], trained.run.sample.model_copy(update={"temperature": 0.0})

    def texts(model: Trained) -> list[str]:
        documents = model.run.data.layout == "documents"
        generation = Generation(
            model.model, model.tokenizer, prompts, greedy, seed=0, documents=documents
        )
        return [result["prompt"] + result["text"] for result in generation.results()]

    ours = texts(trained)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist()[0] == trained.tokenizer.eot
    length = {"max_new_tokens": greedy.max_new_tokens, "do_sample": False}
    made = theirs(folder).generate(**batch, **length)
    assert tokenizer.batch_decode(made, skip_special_tokens=True) == ours
    pipeline = transformers.pipeline(
        "text-generation", model=theirs(folder), tokenizer=tokenizer, batch_size=2
    )
    assert [one[0]["generated_text"] for one in pipeline(prompts, **length)] == ours
    back = load_trained(import_model(str(folder), workshop.folder / "back", None), "best")
    assert back.run.data.layout == "documents"
    assert texts(back) == ours
    save(prepare_hf(back), workshop.folder / "hf2")
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (workshop.folder / "hf2" / file).read_bytes() == (folder / file).read_bytes(), file
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    other = load_trained(import_model(str(folder), workshop.folder / "other", None), "best")
    assert other.run.data.layout == "stream"

"""Which tokens of the files a run takes: a part of the training text, and none of the test text."""

import numpy as np
import pytest
from conftest import Workshop

from gptlite.config.reader import validate
from gptlite.config.strict_yaml import Document
from gptlite.data.prepare import open_split, prepare
from gptlite.errors import ConfigError, DataError
from gptlite.measure.suites import Measurement, measure_loss
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained


def ids(workshop: Workshop, split: str, **sections: object) -> list[int]:
    return list(workshop.files(**sections).tokens(split))


def test_a_seed_takes_its_own_stretch_of_the_training_text(workshop: Workshop) -> None:
    whole = ids(workshop, "train")
    found = {}
    for seed in range(6):
        data = {"train_tokens": 500, "train_from": "seed"}
        files = workshop.files(seed=seed, data=data)
        begin, n = files.span("train")
        assert n == 500
        assert list(files.tokens("train")) == whole[begin : begin + 500]
        assert list(files.tokens("val")) == ids(workshop, "val")
        found[begin] = files.digest
    assert len(found) == len(set(found.values())) == 6
    first = workshop.files(data={"train_tokens": 500})
    assert list(first.tokens("train")) == whole[:500]
    assert "@" not in first.digest


def test_all_of_the_training_text_begins_at_its_beginning(workshop: Workshop) -> None:
    n = len(ids(workshop, "train"))
    data = {"train_tokens": n, "train_from": "seed"}
    assert workshop.files(data=data).span("train") == (0, n)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_the_test_text_is_the_end_of_the_validation_text_and_in_nothing_else(
    workshop: Workshop, layout: str
) -> None:
    whole = ids(workshop, "val", data={"layout": layout})
    data = {"layout": layout, "test_share": 0.4}
    val, test = (ids(workshop, split, data=data) for split in ("val", "test"))
    assert val + test == whole
    assert len(test) == round(0.4 * len(whole))
    files = workshop.files(data=data)
    assert files.digest != workshop.files(data={"layout": layout}).digest
    for split in ("val", "test"):
        (batch,) = files.rows(split, 16).sweep(10_000)
        assert batch.n_targets > 0


def test_they_are_cut_from_several_parts_as_from_one(workshop: Workshop) -> None:
    """Token files in parts are read as one; here by hand, from the plain ones."""
    from gptlite.data.token_files import TokenFiles, part_folder_name

    plain = workshop.files()
    parts = []
    for number, (begin, end) in enumerate([(0, 300), (300, 310), (310, None)]):
        folder = workshop.folder / "many" / part_folder_name(number)
        folder.mkdir(parents=True)
        about = {}
        for split in ("train", "val"):
            piece = np.asarray(plain.tokens(split))[begin:end].astype("<u2")
            piece.tofile(folder / f"{split}.bin")
            about[split] = {"tokens": len(piece)}
        parts.append(about)
    many = TokenFiles(
        workshop.folder / "many", {**plain.meta, "parts": parts}, plain.tokenizer, 400, 12345, 0.5
    )
    one = TokenFiles(plain.folder, plain.meta, plain.tokenizer, 400, 12345, 0.5)
    for split in ("train", "val", "test"):
        assert list(many.tokens(split)[:]) == list(one.tokens(split))


def test_a_run_is_measured_on_text_that_none_of_its_choices_saw(workshop: Workshop) -> None:
    run = workshop.run(data={"test_share": 0.5})
    train(run, workshop.folder / "run")
    trained = load_trained(workshop.folder / "run", "best")
    losses = {}
    for split in ("val", "test"):
        files = open_split(trained.run, trained.tokenizer, split, trained.state.data_digest)
        losses[split] = measure_loss(Measurement(trained, split, lambda files=files: files))
    assert losses["val"]["loss"] == pytest.approx(trained.state.val_loss, rel=1e-6)
    assert losses["test"]["loss"] != losses["val"]["loss"]
    assert losses["test"]["train_loss"] == losses["val"]["train_loss"]
    assert losses["test"]["targets"] == pytest.approx(losses["val"]["targets"], abs=20)


def test_the_tokens_that_training_never_has_are_counted(workshop: Workshop) -> None:
    (workshop.folder / "two.jsonl").write_text('{"text": "abc"}\n{"text": "abd"}\n' * 99)
    for layout in ("stream", "documents"):
        data = {"source": str(workshop.folder / "two.jsonl"), "layout": layout}
        files = workshop.files(data=data, tokenizer={"kind": "byte"})
        tokens = set(files.tokens("train").tolist()) | {256}  # between documents, or before each
        assert set(files.unseen_tokens) == set(range(257)) - tokens
        assert len(tokens) >= 4
    files = workshop.files(data={"train_tokens": 64}, tokenizer={"kind": "byte"})
    assert ord("z") in files.unseen_tokens
    assert set(files.unseen_tokens) == set(range(256)) - set(files.tokens("train"))


def test_what_cannot_be_meant_is_refused(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_from: seed means nothing"):
        workshop.run(data={"train_from": "seed"})
    run = workshop.run()
    with pytest.raises(ConfigError, match="keeps none; data.test_share says"):
        open_split(run, prepare(run).tokenizer, "test")
    with pytest.raises(DataError, match=r"test has 1 token, needs >= 2.*data\.test_share"):
        workshop.files(data={"test_share": 0.001}).tokens("test")
    assert validate(Document({"data": {"source": "x", "test_share": 0.5}}), to_train=False)

"""look.json of a run: what dropout does to one text, for the report."""

from pathlib import Path

from gptlite import storage
from gptlite.data.prepare import open_split
from gptlite.data.tokenizers import Tokenizer
from gptlite.measure.look import look
from gptlite.runs.trained import Trained, load_trained

TOKENS = 12
RATE = 0.5
"""What a run without dropout is shown with."""
MOST_PARAMETERS = 200_000_000
"""Of a model that is read once more for a picture."""


def add_look(directory: Path) -> None:
    """Written where it can be: a picture is no reason to fail."""
    try:
        trained = load_trained(directory, "best")
        run = trained.run
        if run.model.n_parameters(trained.tokenizer.vocab_size) > MOST_PARAMETERS:
            return
        rate = None if any(run.dropout.rates().values()) else RATE
        storage.write_json(directory / "look.json", look(trained, some_text(trained), rate=rate))
    except Exception:  # noqa: BLE001 - of whatever kind: what was trained is worth more
        return


def some_text(trained: Trained) -> str:
    """The beginning of the validation text, as far as it is tokens of one text."""
    files = open_split(trained.run, trained.tokenizer, "val", trained.state.data_digest)
    return whole_text(trained.tokenizer, [int(i) for i in files.tokens("val")[: TOKENS + 1]])


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Without an end of text at the beginning, and up to the next one."""
    inside = ids[1:] if ids[0] == tokenizer.eot else ids[:TOKENS]
    end = inside.index(tokenizer.eot) if tokenizer.eot in inside else TOKENS
    return tokenizer.decode(inside[:end]).strip("\ufffd")

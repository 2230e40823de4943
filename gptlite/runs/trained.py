"""A trained model with all that is needed to use it, from a run directory."""

from dataclasses import dataclass, replace
from pathlib import Path

from gptlite import storage
from gptlite.core.device import adapt, use_threads
from gptlite.core.language_model import LanguageModel
from gptlite.core.model import GPT
from gptlite.core.world import World, unlike_first
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import CheckpointError, DataError
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import Checkpoint, RunState
from gptlite.runs.origin import load_run

TOKENIZER, UNSEEN = "tokenizer/tokenizer.json", "tokenizer/unseen.json"
READS = 5
"""Times to look again where a run saves and prunes meanwhile."""


@dataclass(frozen=True)
class Trained(LanguageModel):
    state: RunState
    problems: list[str]
    """Checkpoints that were passed over, and why."""
    notes: list[str]
    """What is computed in another way than in training, for what this machine lacks."""


def load_trained(run_dir: Path, which: str) -> Trained:
    """The model of a run as a checkpoint has it, in eval mode, as this machine can compute it.

    Raises CheckpointError. The run may be at work: what it prunes while it is read is no failure.
    """
    for attempt in range(1, READS + 1):
        listing = checkpoint.folders(run_dir)
        try:
            return load_checkpoint(run_dir, checkpoint.choose(run_dir, which))
        except CheckpointError:
            if attempt == READS or checkpoint.folders(run_dir) == listing:
                raise
    raise AssertionError


def load_on_all_ranks(run_dir: Path, which: str, world: World) -> Trained:
    """The same model in all ranks: that of the checkpoint which the first one takes."""
    own = load_trained(run_dir, which) if world.first else None
    step = world.broadcast(lambda: own.state.step if own else None)
    trained = own or load_trained(run_dir, f"step-{step}")
    if ranks := unlike_first(world, trained.state.model_dump(mode="json")):
        raise CheckpointError(f"{run_dir}: rank {ranks} has another step {step} than rank 0")
    return agree_on_precision(trained, world)


def agree_on_precision(trained: Trained, world: World) -> Trained:
    """In one precision, that of the run only if all ranks compute in it."""
    own = trained.run.dtype
    if all(dtype == own for dtype in world.gather(own)):
        return trained
    note = f"dtype: {own} -> float32: another rank has no {own} products"
    run = trained.run.model_copy(update={"dtype": "float32"})
    return replace(trained, run=run, notes=trained.notes + [note] * (own != "float32"))


def load_checkpoint(run_dir: Path, found: Checkpoint) -> Trained:
    path, state, problems = found
    run, notes = adapt(load_run([str(run_dir / "config.yaml")], to_train=False))
    use_threads(run)
    text = load_tokenizer(run_dir)
    if tokenizers.digest(text) != state.tokenizer_sha256:
        raise CheckpointError(f"{run_dir}/tokenizer: differs from the one of {path.name}")
    if run.model.model_dump(mode="json") != state.config.get("model"):
        raise CheckpointError(f"{run_dir}/config.yaml: model differs from the one of {path.name}")
    checkpoint.check_weights_size(path, run.model.n_parameters(text.vocab_size))
    model = GPT.of_run(run, text.vocab_size)
    checkpoint.load_weights(model, path)
    model = model.to(run.device).eval()
    return Trained(
        run,
        model,
        text,
        step=state.step,
        trained_length=state.trained_length,
        unseen=load_unseen(run_dir, text.vocab_size),
        state=state,
        problems=problems,
        notes=notes,
    )


def write_tokenizer(run_dir: Path, text: Tokenizer, unseen: tuple[int, ...]) -> None:
    """The tokenizer, and which of its tokens the training text never had."""
    storage.write_text(run_dir / TOKENIZER, storage.seal(text.to_json()))
    storage.write_text(run_dir / UNSEEN, storage.seal({"unseen": list(unseen)}))


def load_unseen(run_dir: Path, vocab_size: int) -> tuple[int, ...]:
    """None where a run of an earlier version does not say. Raises CheckpointError."""
    path = run_dir / UNSEEN
    try:
        ids = storage.unseal(storage.read_regular(path, tokenizers.MOST_BYTES))["unseen"]
    except FileNotFoundError:
        return ()
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r:.100})") from None
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids) or len(ids) >= vocab_size:
        raise CheckpointError(f"{path}: damaged (not ids of this tokenizer)")
    return tuple(ids)


def load_tokenizer(run_dir: Path) -> Tokenizer:
    path = run_dir / TOKENIZER
    try:
        return tokenizers.read_tokenizer(path)
    except DataError as error:
        raise CheckpointError(*error.problems) from None

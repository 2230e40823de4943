"""A model with what it takes to use it: the run that describes it, and its tokenizer."""

from dataclasses import dataclass, field

from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class LanguageModel:
    run: RunConfig
    model: GPT
    tokenizer: Tokenizer
    step: int
    """Updates that it has been trained for."""
    trained_length: int | None
    """Learned positions that training has reached; None: all that there are."""
    unseen: tuple[int, ...] = field(default=(), kw_only=True)
    """Tokens that the training text never had: never sampled, as all that a model knows of them is
    that they do not come, and after one of them it knows nothing."""

    @property
    def context_length(self) -> int:
        """Positions that the model can read and has been trained on."""
        whole = self.run.model.context_length
        return min(self.trained_length or whole, whole)

"""`gptlite eval --suite lm-eval`: EleutherAI's evaluation harness on a run.

The harness asks for log-likelihoods and continuations; the answers come from our model and
tokenizer, cut to the context as its own Hugging Face class cuts them: both give the same numbers.
"""

import logging
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gptlite.core.evaluate import eval_rows
from gptlite.core.generate import Generation, encode_prompt, encode_text
from gptlite.core.language_model import LanguageModel
from gptlite.core.precision import precision
from gptlite.errors import (
    ConfigError,
    DivergedError,
    MissingPackages,
    UserError,
    add_step_to_errors,
)
from gptlite.terminal import wants_bar

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise MissingPackages("--suite lm-eval", "lm-eval") from None

MOST_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; as in the harness."""
Request = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A run as the harness sees a model."""

    def __init__(self, trained: LanguageModel) -> None:
        super().__init__()
        self.trained = trained
        self.context_length = trained.context_length
        self.quiet = not wants_bar("auto", sys.stderr)

    @property
    def eot_token_id(self) -> int:
        """What stands before the first token of a text."""
        text = self.trained.tokenizer
        return encode_prompt(text, "", text.marks.begin is None)[0]

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        return encode_text(self.trained.tokenizer, string, "prompt") if string else []

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-probability of each continuation, and whether greedy choice gives it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        size = eval_rows(self.trained.run, self.trained.tokenizer.vocab_size)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(order), desc="lm-eval", disable=self.quiet, leave=False) as bar:
            for start in range(0, len(order), size):
                part = order[start : start + size]
                found = self.score([requests[i][1:] for i in part])
                for i, answer in zip(part, found, strict=True):
                    answers[i] = answer
                bar.update(len(part))
        return answers

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of (context, continuation) each; what is longer than the model sees is cut in front."""
        rows = [(before + after)[-(self.context_length + 1) :] for before, after in pairs]
        width = max(len(row) for row in rows) - 1
        device = next(self.trained.model.parameters()).device
        ids = torch.tensor([row + [0] * (width + 1 - len(row)) for row in rows], device=device)
        real = torch.tensor([[i < len(row) - 1 for i in range(width)] for row in rows])
        with precision(self.trained.run):
            logits = self.trained.model(ids[:, :-1], None if real.all() else real.to(device))
        log_p = logits.float().log_softmax(-1)
        answers = []
        for line, row, (_, after) in zip(log_p, rows, pairs, strict=True):
            scores = line[: len(row) - 1][-len(after) :]
            asked = torch.tensor(row[1:][-len(after) :], device=device)
            total = scores.gather(-1, asked[:, None]).sum().item()
            if not math.isfinite(total):
                raise DivergedError(f"evaluation loss {-total}")
            answers.append((total, bool((scores.argmax(-1) == asked).all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Of whole texts, in windows that see as much as fits."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context_length,
                context_len=1,
            )
            pairs = [(("", ""), *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy continuations, or sampled where a task asks for it, up to its stop texts."""
        answers = []
        for request in tqdm(requests, "lm-eval", disable=self.quiet, leave=False):
            prompt, asked = request.args
            until = asked.get("until") or []
            options = self.trained.run.sample.model_copy(
                update={
                    "temperature": asked.get("temperature", 0.0) * bool(asked.get("do_sample")),
                    "max_new_tokens": asked.get("max_gen_toks", MOST_NEW_TOKENS),
                    "top_k": None,
                    "top_p": None,
                    "min_p": None,
                    "repetition_penalty": 1.0,
                }
            )
            stops = [until] if isinstance(until, str) else until
            model, text = self.trained.model, self.trained.tokenizer
            generation = Generation(
                model,
                text,
                [prompt],
                options,
                seed=0,
                stops=stops,
                context=self.context_length,
                unseen=self.trained.unseen,
            )
            (result,) = generation.results()
            answers.append(result["text"])
        return answers


def run_tasks(
    trained: LanguageModel, tasks: list[str], include_path: Path | None, limit: int | None
) -> dict[str, Any]:
    """Results by task and metric. Raises ConfigError for a task that is not known."""
    if not all(tasks):
        raise ConfigError("--tasks: required for --suite lm-eval, as in --tasks lambada_openai")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: no such directory")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"--tasks: the harness has no {', '.join(unknown)}")
    try:
        # The harness talks where only results belong.
        with redirect_stdout(sys.stderr), add_step_to_errors(trained.step):
            found = evaluator.simple_evaluate(
                HarnessModel(trained),
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                log_samples=False,
            )
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - of a task's data: the Hub, a file, its YAML
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {why:.200}") from None
    return {task: plain_names(metrics) for task, metrics in found["results"].items()}


def plain_names(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers by the harness's names, without the filter that it writes behind a comma."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }

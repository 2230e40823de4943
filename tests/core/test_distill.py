"""Learning from teachers: what the loss is, and that a model has nothing to learn from itself."""

import pytest
import torch
from conftest import Workshop, trainer_on

from gptlite.core.ensemble import Ensemble
from gptlite.core.loss import Lesson, total_lesson
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.data.batches import IGNORED, batch_at


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_weighted_sum_of_nats_and_divergence(temperature: float) -> None:
    """By the definitions, written out; what is not scored counts in neither."""
    logits, teacher = numbers(2, 3, 5), numbers(2, 3, 5, seed=1)
    targets = torch.tensor([[1, 2, IGNORED], [4, 0, 3]])
    said = (teacher / temperature).log_softmax(-1)
    want = torch.zeros(())
    for b, t in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        p, q = said[b, t].exp(), (logits[b, t] / temperature).softmax(-1)
        want += 0.3 * temperature**2 * (p * (p / q).log()).sum()
        want += 0.7 * -logits[b, t].log_softmax(-1)[targets[b, t]]
    found = total_lesson(logits, targets, Lesson(said, 0.3, temperature))
    torch.testing.assert_close(found, want)


def distilled(workshop: Workshop, teacher: GPT | None, **distill: object) -> Trainer:
    run = workshop.run(
        attention="math",
        dropout={"preset": "none"},
        train={"micro_batch_size": 4, "max_steps": 8},
        distill={"teachers": ["x"], **distill},
    )
    files = workshop.files()
    rows = files.rows("train", run.model.context_length)
    own = trainer_on(run, files)
    taught = None if teacher is None else Ensemble([teacher])
    return Trainer(own.run, rows, files.meta["vocab_size"], teacher=taught)


def gradients(trainer: Trainer) -> torch.Tensor:
    batch = batch_at(trainer.rows, seed=1, step=0, batch_size=trainer.run.train.batch_size)
    trainer.accumulate(batch)
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(workshop: Workshop) -> None:
    twin = distilled(workshop, None).model.eval()
    assert gradients(distilled(workshop, twin, weight=1.0)).abs().max() < 1e-7
    by_text = gradients(distilled(workshop, None))
    torch.testing.assert_close(gradients(distilled(workshop, twin, weight=0.25)), 0.75 * by_text)


def test_a_student_comes_nearer_to_its_teacher(workshop: Workshop) -> None:
    teacher = distilled(workshop, None).model.eval()
    for parameter in teacher.parameters():
        parameter.data *= 3
    student = distilled(workshop, teacher, weight=1.0)
    losses = [update.loss for update in student.updates(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teachers_are_asked_once_for_each_part_of_an_update(workshop: Workshop) -> None:
    teacher, asked = distilled(workshop, None).model.eval(), []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    student = distilled(workshop, teacher)
    for _ in student.updates(3):
        pass
    assert len(asked) == 3 * 2  # updates of 8 rows, 4 at a time


def test_a_lesson_in_parts_of_an_update_is_that_of_the_whole(workshop: Workshop) -> None:
    teacher = distilled(workshop, None).model.eval()
    for parameter in teacher.parameters():
        parameter.data *= 3
    whole = distilled(workshop, teacher)
    parts = distilled(workshop, teacher)
    parts.run = parts.run.model_copy(
        update={"train": parts.run.train.model_copy(update={"micro_batch_size": 2})}
    )
    torch.testing.assert_close(gradients(whole), gradients(parts))

"""Answers under constraints and rewards, from any engine: many requests and particles in one batch.

    vocabulary = Vocabulary.of(tokenizer, size=model.get_output_embeddings().weight.shape[0])
    request = Request(prompt_ids, constraint=regex("[0-9]+", vocabulary), particles=8, seed=1)
    (answer,) = generate(TransformersEngine(model), [request], vocabulary)

Randomness is by seed, particle and position, so an answer does not depend on what else is in the batch, up to the
rounding of the engine. A request that fails gives an answer that says why, and leaves the others alone. What is
raised, by the engine or by ``on_answer``, goes through, with all sequences closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .constraints.protocol import Vocabulary
from .engines.protocol import Engine
from .law import Law
from .request import Answer, Request
from .task import Task

ROWS = 64
"""Particles in one batch; a request that has more is decoded alone."""


def generate(
    engine: Engine,
    requests: Sequence[Request],
    vocabulary: Vocabulary,
    *,
    rows: int = ROWS,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Answer all requests; those that are done make room for the next.

    Args:
        engine: of the model.
        requests: in any mixture of settings.
        vocabulary: of the model's tokenizer.
        rows: particles in one batch.
        on_answer: called with the number of a request and its answer as soon as it is there.

    Returns:
        The answers in the order of ``requests``.

    Raises:
        ValueError: the vocabulary has more or fewer tokens than the model's logits have columns.
    """
    waiting = deque(enumerate(requests))
    running: dict[int, Task] = {}
    answers: dict[int, Answer] = {}
    try:
        while waiting or running:
            new: list[Task] = []
            room = rows - sum(len(task.particles) for task in running.values())
            while waiting and (waiting[0][1].particles <= room or not running):
                number, request = waiting.popleft()
                room -= request.particles
                running[number] = Task(request, vocabulary, engine)
                new.append(running[number])
            _open(engine, new)
            _step(engine, [task for task in running.values() if task.answer is None], vocabulary)
            for number, task in list(running.items()):
                if task.answer is not None:
                    answers[number] = task.answer
                    del running[number]
                    if on_answer is not None:
                        on_answer(number, task.answer)
    finally:
        for task in running.values():
            task.close()
    return [answers[number] for number in range(len(requests))]


def _open(engine: Engine, tasks: Sequence[Task]) -> None:
    """Begin with the prompts of all tasks together."""
    for task in tasks:
        task.guard(task.check)
    alive = [task for task in tasks if task.answer is None]
    for task, handle in zip(alive, engine.open([task.request.prompt for task in alive]), strict=True):
        task.begin(handle)


def _step(engine: Engine, tasks: Sequence[Task], vocabulary: Vocabulary) -> None:
    """One token for every particle of the tasks."""
    particles = [(task, number) for task in tasks for number in task.wanted]
    if not particles:
        return
    logits, places = engine.next_logits([task.particles[number].handle for task, number in particles])
    if logits.shape[-1] != vocabulary.size:
        raise ValueError(
            f"the vocabulary has {vocabulary.size:,} tokens and the model's logits {logits.shape[-1]:,} columns: they "
            f"must be as many; build it by Vocabulary.of(tokenizer, size={logits.shape[-1]}) of the model's tokenizer"
        )
    laws: dict[Law, dict[int, int]] = {}
    for (task, _), place in zip(particles, places, strict=True):
        rows = laws.setdefault(task.request.law, {})
        rows.setdefault(place, len(rows))
    logps = {law: _log_probs(law, logits, list(rows)) for law, rows in laws.items()}
    of_task: dict[int, list[tuple[int, NDArray[np.float64] | ValueError, Tensor]]] = {}
    for (task, number), place in zip(particles, places, strict=True):
        law = task.request.law
        row = logps[law][laws[law][place]]
        of_task.setdefault(id(task), []).append((number, row, logits[place]))
    for task in tasks:
        task.guard(lambda task=task: task.advance(of_task.get(id(task), [])))  # type: ignore[misc]


def _log_probs(law: Law, logits: Tensor, rows: list[int]) -> Sequence[NDArray[np.float64] | ValueError]:
    """The law of each row; where one cannot be used, the error stands in its place."""
    wanted = logits if rows == list(range(len(logits))) else logits[rows]
    try:
        return list(law.log_probs(wanted))
    except ValueError:
        return [_one_row(law, row) for row in wanted]


def _one_row(law: Law, logits: Tensor) -> NDArray[np.float64] | ValueError:
    try:
        return law.log_probs(logits)
    except ValueError as error:
        return error

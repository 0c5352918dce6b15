"""Accuracy per task and paired intervals, from the answers about each picture or clip."""

import numpy as np
from torch import Tensor

from demos.train.lm_data import Batch
from demos.train.train_lm import exact

Answers = list[list[tuple[str, bool]]]  # (task, right) of every question, by medium
RESAMPLES = 2000


def answers_by_row(logits: Tensor, batch: Batch) -> Answers:
    """Right answers of a batch in which every question is asked, row by row."""
    rights = exact(logits, batch)
    row = dict(zip(batch.packed.target_question.tolist(), batch.packed.target_row.tolist(), strict=True))
    result: Answers = [[] for _ in range(len(batch.packed.ids))]
    for index, pair in enumerate(rights):
        result[row[index]].append(pair)
    return result


def task_means(answers: Answers) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for task, right in (pair for medium in answers for pair in medium):
        found.setdefault(task, []).append(right)
    return {task: float(np.mean(rights)) for task, rights in sorted(found.items())}


def mean_of(answers: Answers, tasks: tuple[str, ...] = ()) -> float:
    """Mean over tasks, each weighing the same; of all tasks, or of those named."""
    means = task_means(answers)
    return float(np.mean([mean for task, mean in means.items() if not tasks or task in tasks] or [0.0]))


def paired(one: Answers, two: Answers, tasks: tuple[str, ...] = ()) -> list[float]:
    """Difference of the means with its 95 % interval: bootstrap over media, the same ones for both."""
    rng, found = np.random.default_rng(33), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(one), size=len(one))
        found.append(mean_of([one[i] for i in drawn], tasks) - mean_of([two[i] for i in drawn], tasks))
    low, high = np.quantile(found, [0.025, 0.975])
    return [round(float(v), 4) for v in (mean_of(one, tasks) - mean_of(two, tasks), low, high)]


def summary(answers: Answers, tasks: tuple[str, ...] = ()) -> dict[str, float]:
    """Mean, and every task, rounded."""
    return {"mean": round(mean_of(answers, tasks), 4), **{t: round(v, 4) for t, v in task_means(answers).items()}}

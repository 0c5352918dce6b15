"""The evaluation: every item asked once per reducer, with its own medium and with another's, and the answers counted.

    result = evaluate(items, backend, reducers=["none", "divprune:keep_ratio=0.1"])

The control asks each question about the medium of the item that `swap_id` names: what is still answered right there
was not seen but guessed. Nothing in a result depends on time, on the order of answers or on chance: two runs are
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.evaluation.client import Backend, EvalRequest, Reply
from serve.evaluation.intervals import LEVEL, NUM_RESAMPLES, Resamples, Share
from serve.evaluation.items import Item
from serve.evaluation.scoring import is_right

FORMAT = 1
"""Of the result; raised when a field changes its meaning."""

CROWDED = 3
"""With this many objects or more, a question has to distinguish several."""

Advance = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Column:
    """All that one reducer was asked.

    Attributes:
        reducer: As it was given; None for the backend's default.
        replies, right: By item, with its own medium.
        swapped_replies, swapped_right: With another's; None where there was no control.
    """

    reducer: str | None
    replies: tuple[Reply, ...]
    right: tuple[bool, ...]
    swapped_replies: tuple[Reply | None, ...]
    swapped_right: tuple[bool | None, ...]

    @property
    def label(self) -> str:
        return self.reducer or "server's default"

    @property
    def kept_share(self) -> float | None:
        """Visual tokens kept / in, over all items; None when nobody counted."""
        total = sum(reply.num_visual_tokens_in for reply in self.replies)
        return sum(reply.num_visual_tokens_kept for reply in self.replies) / total if total else None


def num_questions(items: Sequence[Item], reducers: Sequence[str | None], *, control: bool = True) -> int:
    """The number of questions that an evaluation asks."""
    return len(reducers) * (len(items) + control * sum(item.swap_id is not None for item in items))


def ask_items(
    items: Sequence[Item],
    by_id: Mapping[str, Item],
    backend: Backend,
    reducer: str | None,
    *,
    control: bool = True,
    suffix: str = "",
    advance: Advance = lambda: None,
) -> Column:
    """One column.

    Args:
        by_id: Items that a `swap_id` may name, those not asked included.
        suffix: Put after every question.
        advance: Called after every answer.
    """
    own = _replies(items, {item.id: item for item in items}, backend, reducer, suffix, advance)
    swaps = {item.id: by_id[item.swap_id] for item in items if control and item.swap_id is not None}
    swapped = _replies([item for item in items if item.id in swaps], swaps, backend, reducer, suffix, advance)
    return Column(
        reducer=reducer,
        replies=tuple(own[item.id] for item in items),
        right=tuple(_right(item, own[item.id]) for item in items),
        swapped_replies=tuple(swapped.get(item.id) for item in items),
        swapped_right=tuple(_right(item, swapped[item.id]) if item.id in swapped else None for item in items),
    )


def _replies(
    items: Sequence[Item],
    media_of: Mapping[str, Item],
    backend: Backend,
    reducer: str | None,
    suffix: str,
    advance: Advance,
) -> dict[str, Reply]:
    """Replies by id, asked medium by medium so that a feature cache is of use."""
    order = sorted(items, key=lambda item: media_of[item.id].media_index)
    requests = (
        EvalRequest(
            item_id=item.id,
            question=f"{item.question} {suffix}".strip(),
            media=media_of[item.id].media,
            media_type=media_of[item.id].media_type,
        )
        for item in order
    )
    replies = {}
    for item, reply in zip(order, backend.answers(requests, reducer), strict=True):
        replies[item.id] = reply
        advance()
    return replies


def _right(item: Item, reply: Reply) -> bool:
    return is_right(reply.text, (item.answer, *item.accepted), item.scoring)


# ── the result ────────────────────────────────────────────────────────────────────────────────────────────────────────


def summarize(items: Sequence[Item], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """One JSON-ready row per task and group of its items, with one cell per column; see README.

    Groups are "all", each wording, each number of objects ("objects=3"), and many of them together ("objects=3+").
    """
    rows = []
    for task in dict.fromkeys(item.task for item in items):
        for group, chosen in _groups(items, task):
            rows.append(_row(task, group, items, chosen, columns))
    return rows


def _groups(items: Sequence[Item], task: str) -> Iterable[tuple[str, list[int]]]:
    of_task = [i for i, item in enumerate(items) if item.task == task]
    wordings = sorted({items[i].wording for i in of_task if items[i].wording})
    yield "all", of_task
    if len(wordings) > 1:
        yield from ((wording, [i for i in of_task if items[i].wording == wording]) for wording in wordings)
    numbers = {i: n for i in of_task if (n := items[i].num_objects) is not None}
    for number in sorted(set(numbers.values())):
        yield f"objects={number}", [i for i, n in numbers.items() if n == number]
    if crowded := [i for i, n in numbers.items() if n >= CROWDED]:
        yield f"objects={CROWDED}+", crowded


def _row(
    task: str, group: str, items: Sequence[Item], chosen: Sequence[int], columns: Sequence[Column]
) -> dict[str, Any]:
    draws = Resamples([items[i].media_index for i in chosen], f"{task} {group}")
    with_control = [i for i in chosen if columns[0].swapped_right[i] is not None]
    control_draws = Resamples([items[i].media_index for i in with_control], f"{task} {group}") if with_control else None
    first = [columns[0].right[i] for i in chosen]
    cells = []
    for column in columns:
        right = [column.right[i] for i in chosen]
        cell = {"right": sum(right)} | _share(draws.share(right))
        if control_draws is not None:
            cell["swapped"] = _share(control_draws.share([bool(column.swapped_right[i]) for i in with_control]))
        if column is not columns[0]:
            cell["over_first"] = _share(draws.difference(right, first))
        cells.append(cell)
    return {"task": task, "group": group, "items": len(chosen), "cells": cells}


def _share(share: Share) -> dict[str, Any]:
    return {"exact": round(share.value, 4), "interval": [round(share.low, 4), round(share.high, 4)]}


def result_of(
    items: Sequence[Item], columns: Sequence[Column], *, data: Mapping[str, Any], backend: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole result, JSON-ready; equal in two runs."""
    return {
        "format": FORMAT,
        "data": dict(data),
        "answerer": dict(backend),
        "interval": {"level": LEVEL, "resamples": NUM_RESAMPLES, "over": "media"},
        "columns": [
            {"reducer": c.reducer, "kept_share": None if c.kept_share is None else round(c.kept_share, 4)}
            for c in columns
        ],
        "rows": summarize(items, columns),
    }


def answer_lines(items: Sequence[Item], columns: Sequence[Column]) -> Iterable[dict[str, Any]]:
    """Every answer of every column, for a look at what went wrong."""
    for column in columns:
        for i, item in enumerate(items):
            swapped = column.swapped_replies[i]
            yield {
                "id": item.id,
                "task": item.task,
                "wording": item.wording,
                "num_objects": item.num_objects,
                "reducer": column.reducer,
                "question": item.question,
                "right_answer": item.answer,
                "answer": column.replies[i].text,
                "right": column.right[i],
                "swapped_answer": None if swapped is None else swapped.text,
                "swapped_right": column.swapped_right[i],
            }

"""The scores of schedules: right answers to a test set, kept on disk so that a stopped search continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mm
from mm.errors import MmError
from serve.evaluation.items import EvaluationError, Item
from serve.evaluation.scoring import is_right
from serve.lines import cut_unfinished_line


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One reducer asked about every item.

    Attributes:
        num_right: Items answered right.
        num_visual, num_text: Tokens of a prompt on average; visual ones before any are dropped.
    """

    reducer: str
    num_right: int
    num_visual: float
    num_text: float


class Journal:
    """Trials of one search in a file, one JSON line each; the first line has the settings that they share.

    Raises:
        EvaluationError: The file cannot be used, or is about something else.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._trials = path, dict[str, Trial]()
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            if not lines:
                path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        except OSError as error:
            raise EvaluationError(f"cannot use {path}: {error.strerror or error}") from None
        read = [found for line in lines if (found := _parsed(line)) is not None]
        if lines and (not read or read[0] != about):
            raise EvaluationError(
                f"{path} holds the trials of another search (other model, data or settings); choose another --out, or "
                "delete it to begin anew"
            )
        cut_unfinished_line(path)
        for fields in read[1:]:
            self._trials[fields["reducer"]] = Trial(**fields)

    def get(self, reducer: str) -> Trial | None:
        return self._trials.get(reducer)

    def put(self, trial: Trial) -> None:
        self._trials[trial.reducer] = trial
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(trial)) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A line that is damaged counts as not written."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class Trials:
    """Asks a model and keeps the results.

    Args:
        advance: Called after every answer.
    """

    def __init__(
        self,
        model: mm.Model,
        items: Sequence[Item],
        journal: Journal,
        *,
        num_frames: int,
        max_tokens: int,
        advance: Callable[[], None],
    ) -> None:
        self._model, self._items, self._journal, self._advance = model, items, journal, advance
        self._options = {"temperature": 0.0, "max_new_tokens": max_tokens, "return_map": False}
        self._num_frames = num_frames

    def trial(self, reducer: str) -> Trial:
        """Ask all items, unless the journal has the result.

        Raises:
            MmError: An item cannot be asked.
        """
        trial = self._journal.get(reducer)
        if trial is None:
            trial = self._ask(reducer)
            self._journal.put(trial)
        else:
            for _ in self._items:
                self._advance()
        return trial

    def _ask(self, reducer: str) -> Trial:
        requests = [mm.api.build_request(**self._question(item), reducer=reducer) for item in self._items]
        num_right = num_visual = num_prompt = 0
        for at, outcome in self._model.run_batch(requests):
            item = self._items[at]
            if isinstance(outcome, MmError):
                raise EvaluationError(f"at item {item.id!r}: {outcome}") from outcome
            answer = mm.api.collect(iter(outcome))
            num_right += is_right(answer.text, (item.answer, *item.accepted), item.scoring)
            num_visual += answer.usage.num_visual_tokens_in
            num_prompt += answer.usage.num_prompt_tokens
            self._advance()
        count = len(self._items)
        return Trial(
            reducer=reducer,
            num_right=num_right,
            num_visual=num_visual / count,
            num_text=(num_prompt - num_visual) / count,
        )

    def _question(self, item: Item) -> dict[str, Any]:
        media = {"images": [item.media]} if item.kind == "image" else {"videos": [item.media]}
        frames = {"num_frames": self._num_frames} if item.kind == "video" else {}
        return {"prompt": item.question, **media, **frames, **self._options}

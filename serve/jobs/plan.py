"""What a run has to do: the items, held against the records of earlier runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.config import MediaLimits
from mm.errors import MediaError
from mm.media import MediaBudget
from serve.jobs.captioner import read_file
from serve.jobs.discover import Item
from serve.jobs.results import Journal, OutputFolder, Version


@dataclass(kw_only=True)
class Plan:
    """What a run has to do.

    Attributes:
        pending: Items without a record that holds, in order.
        drop: Items among them whose record has to go first.
        num_captioned, num_failed: Items whose record stays.
    """

    pending: list[Item] = field(default_factory=list)
    drop: set[str] = field(default_factory=set)
    num_captioned: int = 0
    num_failed: int = 0


def make_plan(items: Sequence[Item], output: OutputFolder, limits: MediaLimits, *, retry_failed: bool) -> Plan:
    """Compare the items with their records. Reads only files whose size or time differs from the record's."""
    plan = Plan()
    for item in items:
        if item.path in output.captions.entries:
            if _holds(item, output.captions, limits):
                plan.num_captioned += 1
                continue
            plan.drop.add(item.path)
        elif item.path in output.failures.entries:
            if not retry_failed and output.failures.entries[item.path].version == Version.of(item.path):
                plan.num_failed += 1
                continue
            plan.drop.add(item.path)
        plan.pending.append(item)
    return plan


def _holds(item: Item, captions: Journal, limits: MediaLimits) -> bool:
    """Whether the item's caption is about the file as it is now."""
    if captions.entries[item.path].version == Version.of(item.path):
        return True
    with contextlib.suppress(MediaError):
        return captions.read(item.path)["content_hash"] == read_file(item, MediaBudget(limits))[1]
    return False

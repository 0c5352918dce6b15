"""What has left of one request that goes on at another engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.data.request import Emitted
from mm.engine.kv_transfer.messages import KVSink, SequenceHandOff
from mm.engine.kv_transfer.rows import SentRows
from mm.engine.sequence_output import SequenceOutput


@dataclass(eq=False)
class Outgoing:
    """What has left of one request.

    Attributes:
        sink: Takes it.
        before: What its choices had when it came; empty for a request that begins.
        outputs: One for each choice.
        sent: The rows that were sent, by the sequence's choice.
        computed: The sequences of which all but the newest token is in the cache, by choice.
        follows: Choice to the sequence from which it goes on.
        num_parked: Choices that have their next token.
    """

    sink: KVSink
    before: Sequence[Emitted]
    outputs: Sequence[SequenceOutput]
    sent: dict[int, SentRows] = field(default_factory=dict[int, SentRows])
    computed: dict[int, SequenceHandOff] = field(default_factory=dict[int, SequenceHandOff])
    follows: dict[int, int] = field(default_factory=dict[int, int])
    num_parked: int = 0

    @property
    def seed(self) -> int:
        """Of the sampler's noise, also where the request gave none."""
        return self.outputs[0].seed

    @property
    def emitted(self) -> tuple[Emitted, ...]:
        """Per choice, its tokens so far."""
        return tuple(
            self.before[choice]
            if self.before and self.before[choice].is_finished
            else Emitted(token_ids=tuple(output.token_ids), is_finished=output.finish_reason is not None)
            for choice, output in enumerate(self.outputs)
        )

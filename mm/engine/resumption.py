"""Requests that go on at this engine after another one was lost.

The tokens that the other engine gave are put into the new sequences as if they had been sampled here: through
penalties, grammar and detokenizer. From then on each is like a preempted sequence: prompt and tokens are computed
again, and sampling goes on at the next token. The noise of sampling depends on seed, choice and position alone, so the
rest of the text is what the other engine would have given.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from mm.data.request import Emitted
from mm.engine.sampling.sampler import SampledToken
from mm.engine.sequence import Sequence
from mm.errors import EngineError, InvalidRequest


def resume(seqs: Several[Sequence], emitted: Several[Emitted]) -> list[Sequence]:
    """The sequences of a new request that have more to give, behind what was emitted. They are not drafted.

    Args:
        seqs: One per choice.
        emitted: One per choice.

    Raises:
        InvalidRequest: There is not one for each choice, or every choice is finished.
        EngineError: A choice would have ended here before its last emitted token.
    """
    if len(emitted) != len(seqs) or all(one.is_finished for one in emitted):
        raise InvalidRequest("what was emitted has to be given for each choice, one of which is not finished")
    request = seqs[0].request
    going_on = [seq for seq, one in zip(seqs, emitted, strict=True) if not one.is_finished]
    for seq, one in zip(seqs, emitted, strict=True):
        seq.siblings = []
        for token_id in () if one.is_finished else one.token_ids:
            if seq.output.append(SampledToken(token_id)).finish_reason is not None:
                raise EngineError("the request cannot go on: its answer ends earlier at this decoder")
    request.num_unfinished = len(going_on)
    request.num_completion_tokens = sum(len(one.token_ids) for one in emitted)
    return going_on

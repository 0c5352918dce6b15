"""From a request to what vLLM computes: its prompt in vLLM's form, and the sampling parameters of each choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mm.data.request import Request
from mm.data.tokens import EncodedMedia, Prompt
from mm.engine.input_processor import asked_positions, new_request, with_positions
from mm.engine.interface import USE_NATIVE, EngineCapabilities
from mm.engine.prompt_inputs import PromptInputs
from mm.engine.sampling.sampler import Sampler
from mm.engine.sampling.structured_output import GrammarMatcher
from mm.engine.sequence import EngineRequest, OutputSink
from mm.engine.sequence_output import SequenceOutput
from mm.errors import ContextTooLong, InvalidRequest
from mm.models.family import CheckpointFamily
from mm.plugins.calls import PluginCalls
from mm.plugins.reducer import Reducer
from mm.vllm.prompts import WHERE, VllmPrompt, in_line, with_grids
from mm.vllm.sampling import vllm_sampling


@dataclass(kw_only=True, eq=False)
class Choice:
    """One choice of a request: one request of vLLM's.

    Attributes:
        sampling: Arguments of vLLM's `SamplingParams`.
        schema: JSON schema that the answer has to have; empty without one.
        last_token_time: When its newest token came, on the clock of `time.perf_counter`.
        name: What vLLM calls it, once it has it.
    """

    request: EngineRequest
    output: SequenceOutput
    prompt: VllmPrompt
    sampling: dict[str, Any]
    matcher: GrammarMatcher | None = None
    schema: str = ""
    last_token_time: float | None = None
    name: str = ""


class VllmInputs(PromptInputs):
    """Makes choices of requests. Safe to use from several threads.

    Args:
        capabilities: What the engine can do.
        dtype: Of vLLM's model.
        merge: Patches of the tower along each side of a visual token, where items go to vLLM with their grids. None
            where a prompt is a line of embeddings.
    """

    def __init__(
        self,
        family: CheckpointFamily,
        calls: PluginCalls,
        capabilities: EngineCapabilities,
        *,
        dtype: torch.dtype,
        merge: int | None,
    ) -> None:
        super().__init__(family, calls)
        self.calls, self.capabilities = calls, capabilities
        self._dtype, self._merge = dtype, merge

    def process(self, params: Request, media: EncodedMedia, sink: OutputSink) -> list[Choice]:
        """The choices of a request. May wait for a schema to be compiled.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: The request cannot be served as asked.
        """
        reducer = self.reducer_of(media)
        self._check(params, reducer)
        spliced, asked = self.splice(params, media), params.vision.positions
        is_placed = any(item.tokens.placement is not None for item in media.items)
        prompt = spliced if is_placed and asked is None else self._with_positions(params, reducer, spliced)
        given = self._prompt(prompt, media)
        if params.cache_salt:
            given["cache_salt"] = params.cache_salt
        max_new_tokens = room_for_output(params, prompt, self._family.max_context_tokens)
        samplers = self._samplers.make(params.sampling, prompt)
        request = new_request(params, media, prompt, sink, len(samplers))
        return [self._choice(params, request, sampler, given, max_new_tokens) for sampler in samplers]

    def _choice(
        self, params: Request, request: EngineRequest, sampler: Sampler, given: VllmPrompt, max_new_tokens: int
    ) -> Choice:
        return Choice(
            request=request,
            output=SequenceOutput(self.vocabulary, sampler, params.sampling, max_new_tokens),
            prompt=given,
            sampling=vllm_sampling(sampler.params, sampler.choice, max_new_tokens),
            matcher=sampler.matcher,
            schema="" if sampler.matcher is None else sampler.matcher.schema,
        )

    def _check(self, params: Request, reducer: Reducer) -> None:
        """Refuse by name what the engine does not do.

        Raises:
            InvalidRequest: Says what to do.
        """
        if problem := self.capabilities.problem_with_reducer(reducer, self._family.num_position_rows):
            raise InvalidRequest(problem, "vision.reducer")
        if problem := self.capabilities.problem_with_drafter(params.speculation.drafter or "none"):
            raise InvalidRequest(problem, "speculation.drafter")
        if params.emitted:
            raise InvalidRequest(
                f"the engine {self.capabilities.name} cannot go on with an answer that another decoder began; send "
                "the request again"
            )

    def _with_positions(self, params: Request, reducer: Reducer, prompt: Prompt) -> Prompt:
        """The prompt with the positions that it gets. Where nobody asks for any, they are the engine's own.

        Raises:
            InvalidRequest: Others were asked for.
        """
        if len(prompt.positions) > 1 or not prompt.is_visual.any():
            return with_positions(prompt, asked_positions(params.vision.positions, reducer, prompt))
        asked = params.vision.positions
        if asked is None:
            return prompt.compact()
        positions = asked_positions(asked, reducer, prompt)
        if positions not in self.capabilities.positions and not _is_line(prompt):
            raise InvalidRequest(
                f"vision.positions was {asked!r}, which keeps tokens at their places in the unreduced prompt; the "
                f'engine {self.capabilities.name} numbers them anew: send "compact" or leave it out, or {USE_NATIVE}',
                WHERE,
            )
        return with_positions(prompt, positions)

    def _prompt(self, prompt: Prompt, media: EncodedMedia) -> VllmPrompt:
        if self._merge is not None:
            return with_grids(prompt, media.items, self._merge, self._dtype)
        return in_line(prompt, self._dtype)


def _is_line(prompt: Prompt) -> bool:
    """Whether positions are 0, 1, 2, ... already."""
    count = torch.arange(prompt.length)
    return prompt.next_position == prompt.length and bool((prompt.positions[0].cpu() == count).all())


def room_for_output(params: Request, prompt: Prompt, max_context_tokens: int) -> int:
    """Tokens that an output may have: what was asked for, or what the context has room for.

    Raises:
        ContextTooLong: There is no room for what was asked for.
    """
    asked, length = params.sampling.max_new_tokens, max(prompt.length, prompt.next_position)
    if max_context_tokens - length < max(1, asked or 0):
        raise ContextTooLong(length, asked or 1, max_context_tokens)
    return asked or max_context_tokens - length

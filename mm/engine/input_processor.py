"""What a request may have of an engine: room for its answer, positions, reducers inside the decoder."""

from __future__ import annotations

from mm.config import OnError
from mm.data.request import Request
from mm.data.tokens import Positions, Prompt
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_runner import layers_of
from mm.engine.sequence import EngineRequest
from mm.errors import ContextTooLong, InvalidRequest, ReducerFault
from mm.plugins.capabilities import in_decode, in_prefill
from mm.plugins.reducer import Reducer


def answer_length(request: Request, prompt: Prompt, context: int, cache: KVCache) -> int:
    """Tokens that an answer may have: what was asked for, or what context and cache hold.

    Args:
        context: Positions of the model.

    Raises:
        ContextTooLong, InvalidRequest: Not even what was asked for has room.
    """
    asked = request.sampling.max_new_tokens
    num_rows, next_position = prompt.length, prompt.next_position
    if context - next_position < max(1, asked or 0):
        raise ContextTooLong(next_position, asked or 1, context)
    shape = cache.shape
    room = cache.num_blocks // shape.num_layers * shape.block_size - num_rows
    if room < max(1, asked or 0):
        raise InvalidRequest(
            f"the prompt has {num_rows} tokens and {asked or 1} were asked for, but this server's KV cache holds "
            f"{room + num_rows}; shorten the prompt, keep fewer visual tokens, or lower max_tokens",
            "messages",
            "context_length_exceeded",
        )
    return asked or min(room, context - next_position)


def with_positions(prompt: Prompt, positions: Positions) -> Prompt:
    """The prompt with the positions that were asked for.

    Raises:
        InvalidRequest: They cannot be made compact.
    """
    if positions == "kept" or not prompt.is_visual.any():
        return prompt
    if prompt.positions.shape[0] > 1:
        raise InvalidRequest(
            "this model places visual tokens in time, height and width, which compact positions would lose; send "
            'vision.positions = "kept"',
            "vision.positions",
        )
    return prompt.compact()


def add_hooks(job: EngineRequest, reducer: Reducer, num_layers: int, *, on_error: OnError = "fail") -> None:
    """Note at which layers the reducer acts, if the prompt has anything to reduce.

    Args:
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.

    Raises:
        InvalidRequest: The model has no such layer, or two reducers want the same.
        ReducerFault: It does not say where it acts.
    """
    if not job.prompt.is_visual.any():
        return
    job.evictors = in_decode(reducer)
    for stage in in_prefill(reducer):
        try:
            layers = layers_of(stage, num_layers)
        except ReducerFault as error:
            if on_error == "fail":
                raise
            job.faults.append(str(error))
            continue
        for layer in layers:
            if not 0 < layer < num_layers or layer in job.hooks:
                raise InvalidRequest(
                    f"{type(stage).__name__} acts at layer {layer}; this model allows 1 to {num_layers - 1}, each "
                    "for one reducer",
                    "vision.reducer",
                )
            job.hooks[layer] = stage

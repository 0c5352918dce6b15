"""From a request to sequences: room for the output, positions, and the layers at which reducers act."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mm.config import OnError
from mm.data.request import Request
from mm.data.tokens import AskedPositions, EncodedMedia, Prompt, PublishedPositions
from mm.engine.adapted_decoders import AdaptedDecoders
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.states import snapshot_borders
from mm.engine.kv_transfer.messages import KVSink, ReceivedKV
from mm.engine.kv_transfer.outgoing import Outgoing
from mm.engine.kv_transfer.receiving import attach, may_be_drafted
from mm.engine.prefill_pruning import layers_of
from mm.engine.prompt_inputs import PromptInputs
from mm.engine.resumption import resume
from mm.engine.sampling.sampler import Sampler
from mm.engine.sequence import EngineRequest, OutputSink, PrefillOnly
from mm.engine.sequence import Sequence as EngineSequence
from mm.engine.sequence_output import SequenceOutput
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.token_pruning import TokenPruning
from mm.errors import ContextTooLong, EngineError, InvalidRequest, MmError, ReducerFault
from mm.models.arithmetic import Arithmetic
from mm.models.family import CheckpointFamily
from mm.plugins.calls import PluginCalls
from mm.plugins.capabilities import capabilities_of, decoder_weights, in_decode, in_prefill, names_of, per_token
from mm.plugins.reducer import Reducer
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors


class InputProcessor(PromptInputs):
    """Makes sequences of requests. Safe to use from several threads.

    Args:
        calls: Calls the family and the reducers.
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.
    """

    def __init__(
        self,
        family: CheckpointFamily,
        cache: KVCache,
        spec_decoder: SpecDecoder,
        decoders: AdaptedDecoders,
        calls: PluginCalls,
        *,
        on_error: OnError,
    ) -> None:
        super().__init__(family, calls)
        self._cache, self._spec_decoder, self._decoders = cache, spec_decoder, decoders
        self._on_error: OnError = on_error

    def process(
        self, params: Request, media: EncodedMedia | ReceivedKV, sink: OutputSink, reducer: Reducer | None = None
    ) -> list[EngineSequence]:
        """The sequences of a request, one per choice. May wait for a schema to be compiled.

        Args:
            sink: With `PrefillOnly` the prompt ends with its last visual token. A `KVSink` takes the request over.
            reducer: Used in place of `media.reducer`.

        Raises:
            EngineError: What was received does not belong to this request or this model, or cannot move.
            ContextTooLong, InvalidRequest, MediaError: The request cannot be served as asked.
            BadWeights: The weights of a learned reducer are not the encoder's.
        """
        received = media if isinstance(media, ReceivedKV) else None
        if (received is not None or isinstance(sink, KVSink)) and not self._cache.has_all_heads:
            raise EngineError("keys and values of a tensor-parallel decoder cannot move to or from another engine")
        media = media.media if isinstance(media, ReceivedKV) else media
        reducer = reducer or self.reducer_of(media)
        prompt = self.splice(params, media)
        positions = asked_positions(params.vision.positions, reducer, prompt)
        prompt = with_positions(prompt, positions)
        prompt = up_to_media(prompt) if isinstance(sink, PrefillOnly) else prompt
        max_new_tokens = output_length(params, prompt, self._family.max_context_tokens, self._cache)
        samplers = self._samplers.make(params.sampling, prompt)
        request = new_request(params, media, prompt, sink, len(samplers))
        request.renumbers = positions == "renumbered"
        if prompt.is_visual.any() and (weights := decoder_weights(reducer)) is not None:
            request.decoder = self._decoders.add(weights)
        add_reducers(request, reducer, self._family.language.num_layers, self._calls, on_error=self._on_error)
        check_dropping(request, self._family.language.arithmetic)
        seqs = self._sequences(request, samplers, max_new_tokens, is_received=received is not None)
        outputs = [seq.output for seq in seqs]
        seqs = resume(seqs, params.emitted) if params.emitted else seqs
        if isinstance(sink, KVSink) and any(seq.output.num_remaining_tokens > 1 for seq in seqs):
            request.outgoing = Outgoing(sink, params.emitted, outputs)
        hashes = request.block_hashes(self._cache.shape.block_size)
        borders = snapshot_borders(prompt, len(hashes), self._cache.shape)
        for seq in seqs:
            seq.block_hashes, seq.snapshot_borders = list(hashes), borders
        if received is not None:
            attach(seqs, received, self._cache.shape)
        return seqs

    def _sequences(
        self, request: EngineRequest, samplers: Sequence[Sampler], max_new_tokens: int, *, is_received: bool
    ) -> list[EngineSequence]:
        """One for each sampler; those after the first start from the first one's prompt."""
        params = request.params
        is_drafted = not params.emitted or (is_received and may_be_drafted(params.emitted))
        seqs = [
            EngineSequence(
                request=request,
                sampler=sampler,
                output=SequenceOutput(self._samplers.vocabulary, sampler, params.sampling, max_new_tokens),
                spec=self._spec_decoder.new_state(params) if is_drafted else None,
            )
            for sampler in samplers
        ]
        seqs[0].siblings = seqs[1:]
        return seqs


def new_request(
    params: Request, media: EncodedMedia, prompt: Prompt, sink: OutputSink, num_choices: int
) -> EngineRequest:
    """The request inside the engine, before reducers are noted."""
    return EngineRequest(
        params=params,
        media=media.items,
        prompt=prompt,
        sink=sink,
        reducer=media.reducer,
        priority=params.priority,
        deadline=None if params.timeout_s is None else time.perf_counter() + params.timeout_s,
        num_unfinished=num_choices,
        reducer_faults=[item.fault for item in media.items if item.fault],
    )


def output_length(params: Request, prompt: Prompt, max_context_tokens: int, cache: KVCache) -> int:
    """Tokens that an output may have: what was asked for, or what context and cache have room for.

    Raises:
        ContextTooLong, InvalidRequest: There is no room for what was asked for.
    """
    asked = params.sampling.max_new_tokens
    num_tokens, next_position = prompt.length, prompt.next_position
    if max_context_tokens - next_position < max(1, asked or 0):
        raise ContextTooLong(next_position, asked or 1, max_context_tokens)
    shape = cache.shape
    room = cache.num_blocks // shape.num_layers * shape.block_size - num_tokens
    if room < max(1, asked or 0):
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens and {asked or 1} were asked for, but this server's KV cache holds "
            f"{room + num_tokens}; shorten the prompt, keep fewer visual tokens, or lower max_tokens",
            "messages",
            "context_length_exceeded",
        )
    length = asked or min(room, max_context_tokens - next_position)
    if params.sampling.min_tokens > length:
        raise InvalidRequest(
            f"min_tokens was {params.sampling.min_tokens}, but after this prompt there is room for {length}; "
            "shorten the prompt, keep fewer visual tokens, or lower min_tokens",
            "min_tokens",
        )
    return length


def asked_positions(asked: AskedPositions | None, reducer: Reducer, prompt: Prompt) -> PublishedPositions:
    """The positions that a request gets.

    Raises:
        InvalidRequest: What the reducer's authors did cannot be done.
    """
    capabilities = capabilities_of(reducer)
    if asked != "as_published":
        return asked or capabilities.positions
    published, is_line = capabilities.published_positions, prompt.positions.shape[0] == 1
    if published != "renumbered":
        # In models with positions in time, height and width, the authors' code keeps them too.
        return published if is_line else "kept"
    if not is_line or per_token(reducer):
        why = "about which tokens another reducer decides" if is_line else "whose positions are time, height and width"
        raise InvalidRequest(
            "the authors of this reducer number the tokens anew in each layer in which some are dropped, which is not "
            f'possible for prompts {why}; send vision.positions = "kept"',
            "vision.positions",
        )
    return "renumbered"


def with_positions(prompt: Prompt, positions: PublishedPositions) -> Prompt:
    """The prompt with the positions that were asked for.

    Raises:
        InvalidRequest: The model's positions cannot be made compact.
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


def up_to_media(prompt: Prompt) -> Prompt:
    """The prompt up to its last visual token, of which there has to be one."""
    stop = int(prompt.is_visual.nonzero()[-1]) + 1
    return Prompt(
        token_ids=prompt.token_ids[:stop],
        embeddings=prompt.embeddings[:stop],
        positions=prompt.positions[:, :stop],
        next_position=int(prompt.positions[:, stop - 1].max()) + 1,
        is_visual=prompt.is_visual[:stop],
    )


def add_reducers(
    request: EngineRequest, reducer: Reducer, num_layers: int, calls: PluginCalls, *, on_error: OnError = "fail"
) -> None:
    """Note at which layers the reducer acts, if the prompt has visual tokens.

    Raises:
        InvalidRequest: The model has no such layer, or two reducers want the same one.
        ReducerFault: The reducer does not say where it acts, or is switched off.
    """
    if not request.prompt.is_visual.any():
        return
    if on_error == "fail":
        calls.check("reducer", names_of(reducer))
    request.cache_pruners = in_decode(reducer)
    request.token_pruning = _token_pruning(request, reducer, num_layers, calls, on_error)
    for stage in in_prefill(reducer):
        try:
            layers = layers_of(stage, num_layers, calls)
        except ReducerFault as error:
            if on_error == "fail":
                raise
            request.reducer_faults.append(str(error))
            continue
        for layer in layers:
            if not 0 <= layer < num_layers or layer in request.pruning_layers:
                raise InvalidRequest(
                    f"{name_of(stage)} acts at layer {layer}; this model allows 0 to {num_layers - 1}, each "
                    "for one reducer",
                    "vision.reducer",
                )
            request.pruning_layers[layer] = stage


def check_dropping(request: EngineRequest, arithmetic: Arithmetic) -> None:
    """Refuse to drop tokens inside a decoder for which it is not defined what the others then see.

    Args:
        arithmetic: Of the model's layers.

    Raises:
        InvalidRequest: A layer keeps a state, the prompt is longer than a layer's window, or tokens of it attend to
            later ones.
    """
    if not request.pruning_layers and not request.cache_pruners and request.token_pruning is None:
        return
    window = arithmetic.shortest_window
    if arithmetic.is_recurrent:
        why = "this model has layers with a state that every token changes"
    elif arithmetic.shares_keys:
        why = "this model has layers that attend to keys and values of other layers"
    elif request.prompt.mask is not None:
        why = "in this model, tokens of a prompt attend to later ones"
    elif window is not None and request.prompt.length > window:
        why = f"this model has layers that see {window} tokens, and the prompt has {request.prompt.length}"
    else:
        return
    raise InvalidRequest(
        f"{why}, so tokens cannot be dropped inside the decoder; name a reducer that acts before it", "vision.reducer"
    )


def _token_pruning(
    request: EngineRequest, reducer: Reducer, num_layers: int, calls: PluginCalls, on_error: OnError
) -> TokenPruning | None:
    """Who decides about the request's generated tokens, and at which layer; None where nobody does."""
    found = per_token(reducer)
    if len(found) > 1:
        names = " and ".join(name_of(part) for part in found)
        raise InvalidRequest(f"{names} both decide about generated tokens; name one of them", "vision.reducer")
    if not found:
        return None
    name, when = name_of(found[0]), "when asked for its layer"

    def ask() -> object:
        with plugin_errors(name, when):
            return found[0].token_layer(num_layers)

    try:
        layer = calls.call("reducer", (name,), when, ask, timeout_s=calls.limits.step_timeout_s)
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise ReducerFault(name, f"decides at layer {layer!r}; this model allows 0 to {num_layers - 1}")
    except MmError as error:
        if on_error == "fail" or not isinstance(error, ReducerFault):
            raise
        request.reducer_faults.append(str(error))
        return None
    return TokenPruning(reducer=found[0], layer=layer, calls=calls)

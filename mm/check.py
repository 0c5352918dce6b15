"""What of a checkpoint can be served, found without its weights: `mm check`.

Each question is answered on its own, so that one that cannot be answered does not hide the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mm.build import plugin_name
from mm.data.media import Image, Pixels, Video
from mm.errors import MmError
from mm.models.arithmetic import Arithmetic
from mm.models.checkpoint import BadCheckpoint, read_config
from mm.models.folder import reason_of
from mm.models.media_processor import MediaProcessor
from mm.models.pretrained import model_config
from mm.models.probe import WholeModel, names_in_pass, refuse_quantized
from mm.plugins.capabilities import INSIDE_DECODER, capabilities_of, check_compatible
from mm.plugins.reducer import Reducer
from mm.plugins.registry import get, names
from mm.plugins.spec import build_reducer
from mm.vllm.matrix import ModelFacts, engine_matrix

Answer = dict[str, Any]


def check_model(
    folder: Path, *, height: int = 480, width: int = 640, num_frames: int = 8, dtype: torch.dtype = torch.float32
) -> Answer:
    """What works with a checkpoint, and why not where something does not. No weight is read.

    Args:
        height, width: Of the picture and of the frames whose visual tokens are counted.
        num_frames: Frames of the clip whose visual tokens are counted.
        dtype: Of the weights whose memory is counted.

    Returns:
        By question: `model_type`, `encoder`, `family`, `quantised`, `media`, `decoder`, `memory`, `reducers`,
        `drafters`, `engines` (by row and engine, see `mm.vllm.matrix`).
        An answer that begins with "no: " says why. `served` is whether all of them went well.
    """
    raw = read_config(folder)
    found: Answer = {"model_type": raw["model_type"]}
    found["encoder"] = _said(lambda: plugin_name("encoder", folder))
    found["family"] = _said(lambda: plugin_name("family", folder))
    found["quantised"] = _said(lambda: refuse_quantized(folder) or "no, as it has to be")
    found["media"] = _said(lambda: _media(folder, height, width, num_frames))
    whole = _said(lambda: WholeModel(folder, model_config(folder)))
    found["decoder"] = whole if isinstance(whole, str) else _said(lambda: _decoder(whole))
    if not isinstance(whole, str):
        found["memory"] = _said(lambda: _memory(whole, dtype))
    found["reducers"] = _said(lambda: _reducers(str(found["encoder"]), whole))
    found["drafters"] = [name for name in names("drafter") if name != "none"]
    found["engines"] = _said(lambda: _engines(found, whole))
    found["served"] = not any(isinstance(answer, str) and answer.startswith("no: ") for answer in found.values())
    return found


def _said(question: Callable[[], Any]) -> Any:
    """The answer, or "no: " and the reason."""
    try:
        return question()
    except MmError as error:
        return f"no: {error}"
    except Exception as error:
        return f"no: {reason_of(error)}"


def _media(folder: Path, height: int, width: int, num_frames: int) -> Answer:
    """Kind to the visual tokens of an item, or to why it is not taken."""
    processor = MediaProcessor(folder)
    pixels: Pixels = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    times = tuple(float(i) for i in range(num_frames))
    items = {
        "image": Image(pixels=pixels[0], content_hash=""),
        "video": Video(frames=pixels, timestamps_s=times, duration_s=float(num_frames), content_hash=""),
    }
    placeholders = _placeholders(folder, processor)
    found: Answer = {}
    for kind, item in items.items():
        if kind not in processor.samples:
            found[kind] = f"not taken: {processor.refused.get(item.kind, 'unknown')}"
            continue
        ids: list[int] = processor.tokenizer.encode(processor.process(item).text, add_special_tokens=False)  # pyright: ignore[reportUnknownMemberType]
        if not (num_visual := sum(token in placeholders for token in ids)):
            raise BadCheckpoint(
                str(folder),
                f"has a tokenizer without a {kind} token; add tokenizer.json, or the files it is made of",
            )
        found[kind] = f"{num_visual} visual tokens of {len(ids)} in the prompt"
    return found


def _placeholders(folder: Path, processor: MediaProcessor) -> set[int]:
    config = model_config(folder)
    ids = [getattr(config, f"{kind}_token_id", None) for kind in processor.samples]
    return {token for token in ids if isinstance(token, int)}


def _decoder(whole: WholeModel) -> Answer:
    text: Any = whole.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    facts = Arithmetic.of(whole.folder, text, names_in_pass(whole.config))
    return {
        "layers": f"{text.num_hidden_layers} x {type(whole.decoder.layers[0]).__name__}",  # pyright: ignore[reportIndexIssue, reportUnknownArgumentType]
        "positions": facts.max_positions,
        "windows": facts.shortest_window or "none",
        "layers_with_a_state": facts.keeps_state.count(True),
        "deepstack_planes": whole.num_planes,
        "position_axes": 3 if whole.rope_index is not None else 1,
        "tokens_attend_to_later_ones": whole.masks is not None,
    }


def _memory(whole: WholeModel, dtype: torch.dtype) -> Answer:
    """Bytes of the weights of each half, and of a token in the KV cache."""
    encoder, decoder = whole.num_bytes(dtype)
    text: Any = whole.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    facts = Arithmetic.of(whole.folder, text, frozenset())
    token = 2 * facts.num_cached_layers * math.prod(facts.kv_shape) * dtype.itemsize
    return {"encoder_bytes": encoder, "decoder_bytes": decoder, "kv_bytes_per_token": token}


def _engines(found: Answer, whole: WholeModel | str) -> Answer:
    """What each engine can do with the checkpoint."""
    if isinstance(whole, str):
        facts = ModelFacts(family=str(found["family"]))
    else:
        facts = ModelFacts(
            family=str(found["family"]),
            num_position_rows=1 if whole.rope_index is None else 3,
            has_planes=bool(whole.num_planes),
            has_masks=whole.masks is not None,
        )
    reducers = cast("dict[str, str]", found["reducers"] if isinstance(found["reducers"], dict) else {})
    return dict(engine_matrix(facts, reducers))


def _reducers(encoder: str, whole: WholeModel | str) -> Answer:
    """Name of each reducer to "yes", or to what it lacks."""
    host: Any = get("encoder", encoder)
    found: Answer = {}
    for name in names("reducer"):
        if name == "pipeline":  # as good as its parts
            continue
        found[name] = _said(lambda name=name: _works(build_reducer(name), host, encoder, whole))
    return found


def _works(reducer: Reducer, host: Any, encoder: str, whole: WholeModel | str) -> str:
    check_compatible(reducer, host, f"the encoder {encoder!r}")
    acts_inside = any(stage in INSIDE_DECODER for stage in capabilities_of(reducer).stages)
    if not acts_inside or isinstance(whole, str):
        return "yes"
    text: Any = whole.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    facts = Arithmetic.of(whole.folder, text, frozenset())
    if facts.is_recurrent:
        return "no: layers keep a state that every token changes, so none can be dropped inside the decoder"
    if facts.shares_keys:
        return "no: layers attend to keys and values of others, so none can be dropped inside the decoder"
    if whole.masks is not None:
        return "no: tokens of a prompt attend to later ones, so none can be dropped inside the decoder"
    window = facts.shortest_window
    return "yes" if window is None else f"for prompts of at most {window} tokens, the window of a layer"

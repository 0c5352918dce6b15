"""How a small checkpoint of one architecture is described; see `tests.helpers.families`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.helpers.checkpoints import _byte_level

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Family:
    """How one architecture is made small.

    Attributes:
        config: Tokenizer to configuration of the whole model.
        processor: Tokenizer and chat template to processor.
        image, video: What the chat template writes for a picture and for a clip. Without the latter it takes no clips.
        tokens: Control tokens beside the usual ones.
        words: Makes the tokenizer, where it is another one.
        named: Attributes of the tokenizer that name control tokens.
        without: Cases of the tests that transformers itself cannot compute.
        seed: Of the random weights, where those of 0 let an answer hold a token that stands for media.
        in_one_list: Whether the processor wants pictures in one list, and not prompt by prompt.
    """

    config: Callable[[PreTrainedTokenizerFast], Any]
    processor: Callable[[PreTrainedTokenizerFast, str], Any]
    image: str = "<image>"
    video: str = ""
    tokens: tuple[str, ...] = ()
    words: Callable[[], PreTrainedTokenizerFast] | None = None
    named: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    in_one_list: bool = False
    seed: int = 0


def text_config(words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A decoder of three narrow layers."""
    return {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 12,
        "vocab_size": len(words),
        "max_position_embeddings": 4096,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **more,
    }


def template(image: str, video: str) -> str:
    """A chat template that writes `image` and `video` where media are."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}" + image + "\n{% else %}" + video + "\n{% endif %}{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    if family.words is not None:
        return family.words()
    special = ["<pad>", "<s>", "</s>", "<image>", "<video>", *family.tokens]
    named = {"image_token": "<image>", "video_token": "<video>", **dict(family.named)}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special, vocab_size=320 + len(special)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
        additional_special_tokens=list(family.tokens),
    )


def ids(words: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(token) for name, token in tokens.items()}

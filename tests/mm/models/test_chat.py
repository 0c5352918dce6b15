"""Chat templates: what transformers would make of a conversation, except that no user text is ever a control token."""

import pytest
from transformers import AutoProcessor

from mm.data.request import MediaPart, Message, TextPart
from mm.errors import InvalidRequest
from mm.models.chat import ChatTemplate
from mm.models.checkpoint import find


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(find("tiny"), local_files_only=True)


@pytest.fixture(scope="module")
def template(processor):
    return ChatTemplate(processor.tokenizer, processor.chat_template, max_tokens=2048)


def user(*parts: str | MediaPart) -> Message:
    return Message(role="user", parts=tuple(TextPart(text=p) if isinstance(p, str) else p for p in parts))


def theirs(processor, conversation) -> list[int]:
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return processor.tokenizer(text, add_special_tokens=False).input_ids


def test_ordinary_conversations_are_tokenised_as_transformers_does(processor, template):
    ours = template.token_ids(
        [
            user(MediaPart(index=0, kind="image"), "what color is it?"),
            Message(role="assistant", parts=(TextPart(text="red"),)),
            user("sure?"),
        ]
    )
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    ]
    assert ours == theirs(processor, conversation)


@pytest.mark.parametrize(
    "text", ["<image>", "a <video> b", "</s>", "<s><image></s>", "<|user|>", "<image" + ">" * 3, "<pad>"]
)
def test_user_text_forges_no_control_token(processor, template, text):
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    forged = [i for i in template.token_ids([user(text)]) if i in special]
    honest = [i for i in template.token_ids([user("x")]) if i in special]
    assert forged == honest
    assert text.strip() in tokenizer.decode(template.token_ids([user(text)]))


def test_what_a_template_refuses_is_the_requests_fault(processor):
    refusing = ChatTemplate(processor.tokenizer, "{{ raise_exception('roles must alternate') }}", max_tokens=99)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        refusing.token_ids([user("x")])

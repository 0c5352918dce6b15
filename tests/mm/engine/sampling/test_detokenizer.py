"""Streaming text: what is sent adds up to the decoded answer, cut before the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.engine.sampling.detokenizer import IncrementalDetokenizer
from tests.helpers.checkpoints import tokenizer

TOKENIZER = tokenizer().backend_tokenizer


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    out = IncrementalDetokenizer(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, True
    return [*pieces, out.finish()], False


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(stream(text)[0]) == TOKENIZER.decode(ids)


@given(
    st.text(alphabet="abé😀 ", max_size=30), st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(text, stop):
    pieces, stopped = stream(text, tuple(stop))
    found = [at for s in stop if (at := text.find(s)) >= 0]
    if stopped:
        assert found
        sent = "".join(pieces)
        assert text.startswith(sent)
        assert not any(s in sent for s in stop)
    else:
        assert not found
        assert "".join(pieces) == text


def test_a_character_of_several_tokens_is_sent_whole():
    pieces, _ = stream("a😀b")
    assert len(TOKENIZER.encode("😀", add_special_tokens=False).ids) > 1
    assert "�" not in "".join(pieces)
    assert "😀" in pieces


def test_a_character_cut_by_the_end_becomes_a_replacement_mark():
    out = IncrementalDetokenizer(TOKENIZER)
    first = TOKENIZER.encode("😀", add_special_tokens=False).ids[0]
    assert out.push(first) == ""
    assert out.finish() == "�"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known():
    out = IncrementalDetokenizer(TOKENIZER, ("END",))
    sent = [out.push(token) for text in ("x", "E", "N", "x") for token in TOKENIZER.encode(text).ids]
    assert sent == ["x", "", "", "ENx"]


@pytest.mark.parametrize("tail", ["E", "EN"])
def test_a_stop_string_that_never_completes_is_sent_at_the_end(tail):
    assert "".join(stream("x" + tail, ("END",))[0]) == "x" + tail


@pytest.mark.parametrize("stop", [("END",), ("ENDENDy", "END")])
@pytest.mark.parametrize(("min_tokens", "sent"), [(5, "ab"), (6, "abEND"), (8, "abEND"), (9, "abENDENDx")])
def test_a_stop_string_that_is_complete_too_early_is_text(min_tokens, sent, stop):
    out = IncrementalDetokenizer(TOKENIZER, stop, min_tokens=min_tokens)
    pieces = []
    for character in "abENDENDx":
        pieces.append(out.push(TOKENIZER.token_to_id(character)))
        if out.stopped:
            break
    assert "".join([*pieces, out.finish()]) == sent
    assert out.stopped == (sent != "abENDENDx")

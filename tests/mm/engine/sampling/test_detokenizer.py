"""Streaming text: what is sent adds up to the decoded answer, cut before the first stop string."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from mm.engine.sampling.detokenizer import IncrementalDetokenizer, TokenDecoding
from tests.helpers.tokenizers import TOKENIZERS

TOKENIZER = TOKENIZERS["byte_level"]().backend_tokenizer
DECODING = TokenDecoding.of(TOKENIZER)
KINDS = {kind: TokenDecoding.of(make().backend_tokenizer) for kind, make in TOKENIZERS.items()}


def with_decoder(decoder: decoders.Decoder) -> TokenDecoding:
    words = TOKENIZERS["llama"]().backend_tokenizer
    words.decoder = decoder
    return TokenDecoding.of(words)


BLANK, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
KINDS |= {
    "stripped": with_decoder(decoders.Sequence([BLANK, BYTES, FUSE, decoders.Strip(" ", 2, 0)])),
    "cleaned": with_decoder(decoders.Sequence([BLANK, BYTES, FUSE, *(decoders.Replace(f" {c}", c) for c in ".,!?")])),
    "regex": with_decoder(decoders.Sequence([BLANK, FUSE, decoders.Replace(Regex(r" +(?=[a-c])"), "_")])),
    "metaspace": with_decoder(decoders.Metaspace()),
    "suffix": with_decoder(decoders.BPEDecoder("a")),
}


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    out = IncrementalDetokenizer(DECODING, stop)
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


def choices(decoding: TokenDecoding) -> list[int]:
    """Tokens of which few make many odd sequences: bytes, blanks, control tokens, and ids that no token has."""
    size = decoding.tokenizer.get_vocab_size()
    named = ["▁", "a", "b", ".", ",", "##a", "the", "▁the", "é", "中", "Ġ", "ð", "Ł", "ĺ", "Ģ", "Ã", "©", "<0x20>"]
    named += [f"<0x{byte:02X}>" for byte in (0xF0, 0x9F, 0x98, 0x80, 0xC3, 0x70)]
    found = [i for name in named if (i := decoding.tokenizer.token_to_id(name)) is not None]
    return [*found, *sorted(decoding.special)[:2], size, size + 7]


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_of_any_tokenizer_add_up_to_its_own_text(kind):
    decoding, rng = KINDS[kind], random.Random(kind)
    allowed = choices(decoding)
    for _ in range(200):
        ids = [rng.choice(allowed) for _ in range(rng.choice([1, 3, 12, 80]))]
        if rng.random() < 0.3:
            ids = [rng.randrange(decoding.tokenizer.get_vocab_size()) for _ in ids]
        out = IncrementalDetokenizer(decoding)
        pieces = [out.push(token) for token in ids]
        assert "".join([*pieces, out.finish()]) == decoding.tokenizer.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_the_text_of_any_tokenizer(kind):
    decoding, rng = KINDS[kind], random.Random(kind)
    allowed = choices(decoding)
    for _ in range(60):
        ids = [rng.choice(allowed) for _ in range(40)]
        text = decoding.tokenizer.decode(ids, skip_special_tokens=True)
        start = rng.randrange(max(1, len(text) - 3))
        stop = text[start : start + rng.randint(1, 3)] or "a"
        out = IncrementalDetokenizer(decoding, [stop])
        sent = ""
        for token in ids:
            sent += out.push(token)
            if out.stopped:
                break
        sent += out.finish()
        assert stop not in sent
        assert sent == text.split(stop)[0] or decoding.margin != 0, (ids, stop)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "wordpiece", "unigram"])
def test_text_comes_with_its_tokens_and_costs_the_same_for_each(kind):
    decoding = KINDS[kind]
    word = decoding.tokenizer.token_to_id("a")
    out = IncrementalDetokenizer(decoding)
    decoded: list[int] = []
    counted = dataclasses.replace(decoding)
    object.__setattr__(counted, "text", lambda ids: decoded.append(len(ids)) or decoding.text(ids))
    out._decoding = counted
    assert all(out.push(word) for _ in range(300))
    assert max(decoded) < 40


def test_a_character_of_several_tokens_is_sent_whole():
    pieces, _ = stream("a😀b")
    assert len(TOKENIZER.encode("😀", add_special_tokens=False).ids) > 1
    assert "�" not in "".join(pieces)
    assert "😀" in pieces


def test_a_character_cut_by_the_end_becomes_a_replacement_mark():
    out = IncrementalDetokenizer(DECODING)
    first = TOKENIZER.encode("😀", add_special_tokens=False).ids[0]
    assert out.push(first) == ""
    assert out.finish() == "�"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known():
    out = IncrementalDetokenizer(DECODING, ("END",))
    sent = [out.push(token) for text in ("x", "E", "N", "x") for token in TOKENIZER.encode(text).ids]
    assert sent == ["x", "", "", "ENx"]


@pytest.mark.parametrize("tail", ["E", "EN"])
def test_a_stop_string_that_never_completes_is_sent_at_the_end(tail):
    assert "".join(stream("x" + tail, ("END",))[0]) == "x" + tail


@pytest.mark.parametrize("stop", [("END",), ("ENDENDy", "END")])
@pytest.mark.parametrize(("min_tokens", "sent"), [(5, "ab"), (6, "abEND"), (8, "abEND"), (9, "abENDENDx")])
def test_a_stop_string_that_is_complete_too_early_is_text(min_tokens, sent, stop):
    out = IncrementalDetokenizer(DECODING, stop, min_tokens=min_tokens)
    pieces = []
    for character in "abENDENDx":
        pieces.append(out.push(TOKENIZER.token_to_id(character)))
        if out.stopped:
            break
    assert "".join([*pieces, out.finish()]) == sent
    assert out.stopped == (sent != "abENDENDx")

"""Small tokenizers of every kind that checkpoints have, made by the `tokenizers` library and not by us."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.checkpoints import idefics_tokenizer, qwen_tokenizer, tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;'\"<>|/_-()[]{}\n"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's, Vicuna's and Mistral's kind: BPE over whole texts, rare characters in bytes, a blank before a text."""
    raw = Tokenizer(
        _bpe(["<unk>", "<s>", "</s>"], "▁", [("▁", "t"), ("h", "e"), ("▁t", "he"), ("c", "o"), ("▁", "co")])
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(raw, ["<image>", "<video>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's kind: as Llama's without the blank, with added tokens that are not special."""
    raw = Tokenizer(
        _bpe(["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "<b>"], "▁", [("▁", "t"), ("h", "e"), ("▁t", "he")])
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_tokens(["\n\n", "<b>"])
    special = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>"]
    return _fast(raw, special, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram with its Metaspace, in which control tokens are pieces of the vocabulary."""
    words = ["▁the", "▁circle", "▁is", "red", "blue"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -2.0) for word in words)]
    vocab += [(c, -6.0) for c in "▁" + CHARACTERS] + [("<image>", 0.0), ("<|user|>", 0.0), ("<|assistant|>", 0.0)]
    raw = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<image>", "<|user|>", "<|assistant|>"]
    return _fast(raw, special, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind. Its decoder glues pieces together and cleans up the blanks before punctuation."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[IMG]"]
    tokens = [
        *special,
        "the",
        "circle",
        "is",
        "red",
        "not",
        "do",
        *CHARACTERS.strip(),
        *(f"##{c}" for c in CHARACTERS.strip()),
    ]
    raw = Tokenizer(models.WordPiece({token: i for i, token in enumerate(dict.fromkeys(tokens))}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _fast(raw, ["[IMG]"], unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def _bpe(first: list[str], more: str, merges: list[tuple[str, str]]) -> models.BPE:
    tokens = dict.fromkeys([*first, *BYTES, *more, *CHARACTERS, *"éü中文", *(a + b for a, b in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _fast(raw: Tokenizer, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=special, **named)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": tokenizer,
    "qwen": qwen_tokenizer,
    "idefics": idefics_tokenizer,
    "llama": llama_tokenizer,
    "gemma": gemma_tokenizer,
    "unigram": unigram_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}

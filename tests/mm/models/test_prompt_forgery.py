"""No text of a request is a control token, and no innocent prompt is changed: all families' templates, in threads.

Ids of innocent prompts are compared with those of transformers. The full size is MM_FORGERY_TEXTS=20000.
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from transformers import AutoTokenizer

from mm.data.request import MediaPart, Message, TextPart
from mm.errors import InvalidRequest
from mm.models.chat import ChatTemplate
from mm.models.checkpoint import find
from tests.helpers.checkpoints import IDEFICS_TEMPLATE, QWEN_TEMPLATE, TEMPLATE
from tests.helpers.tokenizers import TOKENIZERS

NUM_TEXTS = int(os.environ.get("MM_FORGERY_TEXTS", "2000"))
NUM_THREADS = 8

VICUNA = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text | trim }}{% else %}<image>\n{% endif %}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '' }} {% endfor %}ASSISTANT:"
)
GEMMA = (
    "{{ bos_token }}{%- macro text_of(content) -%}{%- for p in content -%}{%- if p.type == 'image' -%}<start_of_image>"
    "{%- else -%}{{ p.text | trim }}{%- endif -%}{%- endfor -%}{%- endmacro -%}{%- for m in messages -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{{ text_of(m.content) | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{{ '<start_of_turn>model\n' }}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ '\n' }}{% endfor %}{{ '<|assistant|>' }}"
)
BERT = (
    "[CLS]{% for m in messages %}{{ m.role }} {% for p in m.content %}{{ '[IMG]' if p.type == 'image' else p.text }}"
    "{% endfor %}[SEP]{% endfor %}"
)
TEMPLATES = {
    "byte_level": TEMPLATE,
    "qwen": QWEN_TEMPLATE,
    "idefics": IDEFICS_TEMPLATE,
    "llama": VICUNA,
    "gemma": GEMMA,
    "unigram": PHI,
    "wordpiece": BERT,
    "tiny": None,
}

TRANSFORMING = """{% macro shout(x) %}{{ x | upper }}{% endmacro %}{% set ns = namespace(all='') %}{{ bos_token }}
{%- for m in messages %}{% for p in m.content if p.type == 'text' %}{% set t = p.text %}
{{- shout(t) ~ '|' ~ t[:7] ~ t[-3:] ~ (t | length) ~ '%s!' % t ~ (t | replace('xy', '<')) ~ '{}'.format(t) }}
{{- [t, 'x', t] | join('') }}{{ t.split('a') | join('<') }}{{ t | tojson }}{{ {'k': [t]} | tojson }}{{ [t] }}
{{- t | title }}{{ t | lower | capitalize }}{{ t | indent(2) }}{{ t * 2 }}{{ '<' ~ t ~ '>' }}{{ '<' + t + '>' }}
{{- '%s%s' | format('<', t) }}{{ t.partition('i') | list | reverse | join }}{{ t | list | join }}{{ t.lstrip('<') }}
{%- set ns.all = ns.all + t %}{% set block %}{{ t }}{{ t }}{% endset %}{{ block | trim }}{{ t.strip() | e }}
{%- if t.startswith('<') or '>' in t or t == 'abc' %} looks odd{% endif %}{{ t.replace('a', t) }}{{ t | truncate(9) }}
{%- endfor %}{% endfor %}{{ ns.all | lower }}{{ ns.all | upper }}{{ ns.all.splitlines() | join('<') }}"""

INNOCENT = [
    "What colour is the circle?",
    "  blanks before and after  ",
    "a\n\n\nb\tc \n",
    "é中文字 😀 ümlaut ﷺ ½",
    "x < y > z | w && [q] (r) {s}",
    "{{ messages }} {% raw %} %s {0}",
    "DON'T 'quote' \\n \\u00e9",
    "<b>bold</b> the the co",
    "",
    " ",
    "\n",
    "\U0010fffd\U0010fff0 private \ue000",
]


@cache
def template_of(family: str):
    words = AutoTokenizer.from_pretrained(find("tiny")) if family == "tiny" else TOKENIZERS[family]()
    source = TEMPLATES[family] or words.chat_template
    words.chat_template = source
    return words, ChatTemplate(words, source, max_tokens=1 << 20)


def spellings(words) -> list[str]:
    return sorted(t.content for t in words.added_tokens_decoder.values() if t.special)


def hostile(words, rng: random.Random) -> list[str]:
    """A text of spelled special tokens, whole, doubled, nested or with other cases, cut into parts at random."""
    pieces = []
    for _ in range(rng.randint(1, 6)):
        token = rng.choice(spellings(words))
        at = rng.randrange(len(token))
        odd = [token, token[:at], token[at:], token.upper(), token[:at] + token + token[at:], f" {token}\n", "x"]
        pieces.append(rng.choice([*odd, *INNOCENT[:6]]))
    text = "".join(pieces)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 4)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def conversation(rng: random.Random, texts) -> list[tuple[str, list[str | None]]]:
    """Roles with their parts; None is a picture."""
    roles = rng.choice([["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant"]])
    turns = [(role, list(texts())) for role in roles]
    return [(role, [None, *parts] if role == "user" and rng.random() < 0.3 else parts) for role, parts in turns]


def ours(template, turns) -> list[int]:
    def part(text):
        return MediaPart(index=0, kind="image") if text is None else TextPart(text=text)

    return template.token_ids([Message(role=role, parts=tuple(map(part, parts))) for role, parts in turns])


def theirs(words, turns) -> list[int]:
    messages = [
        {"role": role, "content": [{"type": "text", "text": t} if t is not None else {"type": "image"} for t in parts]}
        for role, parts in turns
    ]
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = words.bos_token or ""
    return words(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids


def control(words, ids) -> list[int]:
    """The control tokens among ids. Unknown characters are no control token, although their token is special."""
    special = {i for i, t in words.added_tokens_decoder.items() if t.special} - {words.unk_token_id}
    return [i for i in ids if i in special]


@pytest.mark.parametrize("family", TEMPLATES)
def test_no_text_is_a_control_token_and_no_innocent_prompt_changes_in_threads(family):
    words, template = template_of(family)
    rng, num = random.Random(family), -(-NUM_TEXTS // len(TEMPLATES))
    bad = [conversation(rng, lambda: hostile(words, rng)) for _ in range(num)]
    good = [conversation(rng, lambda: rng.choices(INNOCENT, k=rng.randint(1, 3))) for _ in range(num // 2)]
    wanted = [control(words, ours(template, [(r, ["x" if t else t for t in p]) for r, p in turns])) for turns in bad]
    unchanged = [theirs(words, turns) for turns in good]  # before the threads: this tokenizer is not safe in them
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        mixed = [*bad, *good]
        order = list(range(len(mixed)))
        rng.shuffle(order)
        ids = dict(zip(order, pool.map(lambda i: ours(template, mixed[i]), order), strict=True))
    for i, turns in enumerate(bad):
        assert control(words, ids[i]) == wanted[i], turns
    for i, turns in enumerate(good):
        assert ids[len(bad) + i] == unchanged[i], turns


@pytest.mark.parametrize("family", ["byte_level", "qwen", "gemma", "wordpiece"])
def test_nothing_that_a_template_does_with_text_makes_a_control_token_of_it(family):
    words, _ = template_of(family)
    template = ChatTemplate(words, TRANSFORMING, max_tokens=1 << 20)
    rng = random.Random(family)
    begins = [words.bos_token_id] if words.bos_token else []
    for _ in range(30):
        inside = rng.choice(spellings(words)).strip("<>[]")
        parts = [*hostile(words, rng), inside, inside.upper(), inside.replace("i", "xyi"), "<", ">"]
        assert control(words, ours(template, [("user", parts)])) == begins, parts


@pytest.mark.parametrize("family", ["byte_level", "qwen", "gemma"])
def test_what_templates_do_with_innocent_text_is_what_transformers_does(family):
    words, _ = template_of(family)
    template = ChatTemplate(words, TRANSFORMING, max_tokens=1 << 20)
    theirs_of = TOKENIZERS[family]()
    theirs_of.chat_template = TRANSFORMING
    for text in ["abc", *INNOCENT, "ǅ ß ﬁ İstanbul ΌΣ", "a<b>c", "one two\r\nthree\x85four"]:
        for turns in ([("user", [text])], [("user", [text, "image start x", text])]):
            assert ours(template, turns) == theirs(theirs_of, turns), text


def test_a_long_text_of_spelled_tokens_costs_no_more_calls_than_words(monkeypatch):
    _, template = template_of("qwen")
    calls = []
    ids = template.tokenizer.ids
    monkeypatch.setattr(template.tokenizer, "ids", lambda text, **options: calls.append(text) or ids(text, **options))
    ours(template, [("user", ["<|im_start|>" * 1000])])
    assert len(calls) == 1


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match="no character of Unicode"):
        ours(template_of("qwen")[1], [("user", [text])])


def test_a_role_that_spells_a_token_is_refused():
    with pytest.raises(InvalidRequest, match="role"):
        ours(template_of("qwen")[1], [("user<|im_end|>", ["x"])])

"""No chat template takes the server's memory or time, while it is compiled or rendered. Each one here tries."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mm.data.request import Message, TextPart
from mm.errors import InvalidRequest, PluginFault
from mm.models import chat
from mm.models.chat import ChatTemplate
from mm.models.renderer import MAX_CHILDREN, RenderedTooLong, Renderer, TemplateRefused
from tests.helpers.tokenizers import TOKENIZERS

MEMORY_BYTES, CPU_S = 64 << 20, 0.4
PLAIN = "{{ messages[0].content[0].text }}"

HUNGRY = [
    "{{ 'a' * 3000000000 }}",
    "{{ ('a' * 30000) * 100000 }}",
    "{{ 3000000000 * 'a' }}",
    "{{ [0] * 3000000000 }}",
    "{{ (1, 2) * 3000000000 }}",
    "{% set n = 3000000000 %}{{ 'a' * n }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ 'a'.ljust(3000000000) }}",
    "{{ 'a'.rjust(3000000000) }}",
    "{{ 'a'.center(3000000000) }}",
    "{{ '7'.zfill(3000000000) }}",
    "{{ 'a' | indent(3000000000, true) }}",
    "{{ '%3000000000d' % 7 }}",
    "{{ '%3000000000d' | format(7) }}",
    "{{ '{:3000000000}'.format('a') }}",
    "{{ '{0:>3000000000}'.format(1) }}",
    "{{ '\\t'.expandtabs(2000000000) }}",
    "{{ (messages[0].content[0].text * 30000) * 100000 }}",
    "{{ messages[0].content[0].text | center(3000000000) }}",
    "{{ messages[0].content[0].text.ljust(3000000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 100000) }}",
    "{{ ('b' * 100000).join('a' * 100000) }}",
    "{{ ('a' * 100000) | join('b' * 100000) }}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "{% set big %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}{{ big }}",
    "{{ range(99999) | map('string') | list | tojson(indent=99999) }}",
    "{{ 'a' | wordwrap(1, wrapstring='b' * 3000000000) }}",
    "{{ lipsum(n=99999) * 99999 }}",
    "{{ ('a' * 9999999) | list | batch(2) | list | list }}",
    "{{ 'a' | urlize(rel='b' * 3000000000) }}",
    "{{ 10 ** 1000000000 }}",
    "{{ (2 ** 4000000000) is even }}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x %}{{ range(99999) | sum }}{% endset %}{% endfor %}",
    "{{ 7 ** 30000000 % 10 }}",
    "{{ (7 ** 3000000) * (7 ** 3000000) % 7 ** 2999999 }}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n) if n else '' }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{% set x %}{{ range(99999) | sort(reverse=true) | length }}{% endset %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = ('ab' * 500000).count('ba' * 1000) %}{% endfor %}",
    "{% for i in range(99999) %}{% set y = (range(9999) | groupby('real')) %}{% endfor %}",
    "{% for a in lipsum(n=9999) | list %}{% for b in lipsum(n=9999) %}{% endfor %}{% endfor %}",
]
REFUSED = [
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 9) | list }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{{ 'a' * 10 ** 30 }}",
    "{% include 'x' %}",
    "{{ undefined.x }}",
]
INVALID = ["{% for %}", "{{ 'a", "{% endfor %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% x %}"]


@pytest.fixture(scope="module")
def renderer():
    renderer = Renderer(MEMORY_BYTES, CPU_S)
    yield renderer
    renderer.close()


def render(renderer: Renderer, source: str, max_chars: int = 10_000) -> str:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    return renderer.render(source, messages, {}, alphabet="<>", taken=frozenset(), max_chars=max_chars)


@pytest.mark.parametrize("source", [*HUNGRY, *ENDLESS])
def test_a_template_that_takes_too_much_is_stopped(renderer, source):
    before_mb, threads = resident_mb(), threading.active_count()
    with pytest.raises((PluginFault, TemplateRefused, RenderedTooLong)):
        render(renderer, source)
    assert resident_mb() - before_mb < 20
    assert threading.active_count() == threads
    assert len(render(renderer, PLAIN)) == len("hello")


def test_what_was_too_much_is_named(renderer):
    with pytest.raises(PluginFault, match="the chat template: needed more than 64 MiB of memory"):
        render(renderer, "{{ ('a' * 30000) * 100000 }}")
    with pytest.raises(PluginFault, match=r"the chat template: took more than 0.4 s of CPU time"):
        render(renderer, ENDLESS[0])
    with pytest.raises(RenderedTooLong) as caught:
        render(renderer, "{{ 'a' * 10001 }}")
    assert caught.value.num_chars == 10_001
    assert len(render(renderer, "{{ 'a' * 10000 }}")) == 10_000


@pytest.mark.parametrize("source", REFUSED)
def test_an_error_of_a_template_ends_no_child(renderer, source):
    (before,) = renderer._idle
    with pytest.raises(TemplateRefused):
        render(renderer, source)
    assert renderer._idle == [before]
    assert before.is_alive


@pytest.mark.parametrize("source", [*INVALID, HUNGRY[0], HUNGRY[6], ENDLESS[0]])
def test_a_template_that_can_never_be_used_is_refused_at_load(monkeypatch, renderer, source):
    monkeypatch.setattr(chat, "RENDERER", renderer)
    with pytest.raises(ValueError, match=r"its chat template cannot be (compiled|used)"):
        ChatTemplate(TOKENIZERS["byte_level"](), source, max_tokens=100)


def test_a_template_that_writes_more_than_the_context_is_refused_before_it_is_tokenised(monkeypatch, renderer):
    monkeypatch.setattr(chat, "RENDERER", renderer)
    messages = [Message(role="user", parts=(TextPart(text="hello"),))]
    for count, number in ((200_000, 100), (2_000_000, 100_000)):
        template = ChatTemplate(TOKENIZERS["byte_level"](), f"{{{{ 'ab ' * {count} }}}}", max_tokens=number)
        monkeypatch.setattr(template.tokenizer, "ids", refuse_long(template.tokenizer.ids))
        with pytest.raises(InvalidRequest) as caught:
            template.token_ids(messages)
        assert caught.value.code == "context_length_exceeded"


def refuse_long(ids):
    def checked(prompt: str, **options):
        assert len(prompt) <= 64 * 1024
        return ids(prompt, **options)

    return checked


def test_threads_share_the_children(renderer):
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: len(render(renderer, PLAIN)), range(200)))
    assert found == [5] * 200
    assert len(renderer._idle) <= MAX_CHILDREN


def test_a_child_ends_with_its_parent(tmp_path):
    code = """
import os, signal
from mm.models.renderer import Renderer
renderer = Renderer()
renderer.compile("x")
print(renderer._idle[0].process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pid = int(run.stdout)
    deadline = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

"""One card per side of the comparison: its answer, what it took and saved, and which tokens it kept, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from serve.page.figures import kibibytes, milliseconds, percent_less, signed_saving
from serve.page.form import Side
from serve.page.media import Preview
from serve.page.pictures import kept_pictures
from serve.page.reply import Partial, Reply, ServerProblem
from serve.page.request import Turn
from serve.page.words import marked

STAGES = ("load", "encode", "reduce", "queue", "prefill", "decode")
COPY = (
    "const text = this.nextElementSibling.textContent, done = () => { this.textContent = 'Copied' };"
    "if (navigator.clipboard) navigator.clipboard.writeText(text).then(done);"
    "else { const area = document.createElement('textarea'); area.value = text; document.body.append(area);"
    "area.select(); document.execCommand('copy'); area.remove(); done(); }"
)
"""Pages that come over plain HTTP from elsewhere have no clipboard interface."""


class Stopped:
    """The answer was stopped before anything of it came."""


Result = Partial | Reply | ServerProblem | Stopped | None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a card shows.

    Attributes:
        result: None before it is asked.
        is_busy: Whether it is being answered; a `Partial` that is not was stopped.
        turns: Before this question.
        expected: The right answer, where it is known.
        snippets: Language to the code that asks the same.
        note: What to know about the turns before.
    """

    side: Side
    result: Result = None
    is_busy: bool = False
    turns: tuple[Turn, ...] = ()
    expected: str | None = None
    snippets: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def reply(self) -> Reply | None:
        return self.result if isinstance(self.result, Reply) else None


def cards(all_shown: Sequence[Shown], previews: Sequence[Preview]) -> str:
    """All cards, on one scale of time and compared with the first."""
    replies = [shown.reply for shown in all_shown]
    scale_s = longest_stage_s(*replies)
    full = replies[0] if replies else None
    shown = "".join(_card(one, full, scale_s, previews) for one in all_shown)
    return f'<div class="mm-cards">{shown}</div>'


def _card(shown: Shown, full: Reply | None, scale_s: float, previews: Sequence[Preview]) -> str:
    side, reply = shown.side, shown.reply
    total = f'<b class="mm-headline">{milliseconds(total_s(reply))}</b>' if reply and reply.timings_s else ""
    head = f"<header><h2>{escape(side.title)}</h2><span>{escape(side.detail)}</span>{total}</header>"
    body = [*(_turn(turn) for turn in shown.turns), shown.note and f'<p class="mm-note">{escape(shown.note)}</p>']
    if isinstance(shown.result, ServerProblem):
        body.append(error(shown.result.message, shown.result.hint))
    elif isinstance(shown.result, Stopped):
        body.append('<p class="mm-note mm-stopped">Stopped before an answer came.</p>')
    elif isinstance(shown.result, Partial) and (shown.result.text or not shown.is_busy):
        grows = " mm-growing" if shown.is_busy else ""
        body.append(f'<p class="mm-answer{grows}">{marked(shown.result.text, shown.result.pieces)}</p>')
        if not shown.is_busy:
            body.append('<p class="mm-note mm-stopped">Stopped.</p>')
    elif reply is not None:
        body += _answered(shown, reply, full, scale_s, previews)
    else:
        busy = shown.is_busy
        body.append(f'<p class="mm-wait{" mm-busy" if busy else ""}">{"Asking" if busy else "Next"}</p>')
    kind = "mm-full" if side.is_full else "mm-reduced"
    return f'<section class="mm-card {kind}" aria-label="{escape(side.title)}">{head}{"".join(body)}</section>'


def _turn(turn: Turn) -> str:
    media = f" <i>({escape(turn.upload.name)})</i>" if turn.upload else ""
    return (
        f'<div class="mm-turn"><p class="mm-asked">{escape(turn.text)}{media}</p>'
        f'<p class="mm-said">{escape(turn.answer.strip()) or "<em>(an empty answer)</em>"}</p></div>'
    )


def _answered(shown: Shown, reply: Reply, full: Reply | None, scale_s: float, previews: Sequence[Preview]) -> list[str]:
    other = None if full is None or shown.side.is_full else full
    body = [f'<p class="mm-answer">{marked(reply.text, reply.pieces, other.text if other else None)}</p>']
    if shown.expected is not None:
        body.append(f'<p class="mm-expected">The right answer: {escape(shown.expected)}</p>')
    if reply.finish_reason == "length":
        body.append('<p class="mm-note">Cut off at the limit of answer tokens.</p>')
    body += [f'<p class="mm-note">All tokens were kept: {escape(fault)}</p>' for fault in reply.reducer_faults]
    body += [_drafting(reply), _meter(reply, other), _facts(reply, other), _bars(reply, scale_s), _usage(reply)]
    if reply.kept:
        body.append(kept_pictures(previews, reply.kept))
    return [*body, _code(shown.snippets)]


def _drafting(reply: Reply) -> str:
    """How much of the answer was drafted, beside the colour it has."""
    if reply.mean_acceptance_length is None:
        return ""
    drafted = sum(piece.num_tokens for piece in reply.pieces if piece.is_drafted)
    return (
        f'<p class="mm-note mm-drafting"><mark class="mm-drafted">Drafted</mark> {drafted:,} of '
        f"{reply.num_completion_tokens:,} tokens; mean accepted length {reply.mean_acceptance_length:.2f}</p>"
    )


def _meter(reply: Reply, other: Reply | None) -> str:
    tokens_in, kept = reply.num_visual_tokens_in, reply.num_visual_tokens_kept
    if tokens_in is None or kept is None:
        return '<p class="mm-note">This server does not report visual tokens.</p>'
    share = kept / tokens_in if tokens_in else 0.0
    return (
        f'<div class="mm-meter"><b>{kept:,}</b> <span>of {tokens_in:,} visual tokens ({share:.0%})</span>'
        f'<div class="mm-track"><i style="width:{min(share, 1):.2%}"></i></div></div>'
    )


def _facts(reply: Reply, other: Reply | None) -> str:
    """The KV cache, and what was saved of it and of the time."""
    facts: list[str] = []
    if reply.kv_bytes is not None:
        facts.append(f"<span>KV cache <b>{kibibytes(reply.kv_bytes)}</b></span>")
    if other is not None and other.kv_bytes and reply.kv_bytes is not None:
        facts.append(f"<span>saved <b>{percent_less(other.kv_bytes, reply.kv_bytes)}</b></span>")
    return f'<p class="mm-facts">{"".join(facts)}</p>' if facts else ""


def stages_of(reply: Reply) -> list[tuple[str, float]]:
    """(stage, seconds) in the order a request meets them; a queue without waiting is left out."""
    known = [stage for stage in STAGES if stage in reply.timings_s]
    unknown = [stage for stage in reply.timings_s if stage not in STAGES]
    times = [(stage, reply.timings_s[stage]) for stage in (*known, *unknown)]
    return [(stage, seconds) for stage, seconds in times if stage != "queue" or seconds >= 0.001]


def total_s(reply: Reply) -> float:
    """Seconds of all stages."""
    return sum(seconds for _, seconds in stages_of(reply))


def longest_stage_s(*replies: Reply | None) -> float:
    """Seconds of the longest stage of any reply: the common scale of their bars."""
    return max((seconds for reply in replies if reply for _, seconds in stages_of(reply)), default=0.0)


def _bars(reply: Reply, scale_s: float) -> str:
    rows = stages_of(reply)
    if not rows:
        return '<p class="mm-note">This server does not report stage times.</p>'
    cells = "".join(_bar(stage, seconds, scale_s) for stage, seconds in rows)
    cached = dict(rows).get("load") == dict(rows).get("encode") == 0
    note = '<p class="mm-note">The encoder had this in its cache.</p>' if cached else ""
    return f'<dl class="mm-bars">{cells}</dl>{note}'


def _bar(stage: str, seconds: float, scale_s: float) -> str:
    width = seconds / scale_s if scale_s else 0.0
    bar = f'<i style="width:{width:.2%}"></i>' if seconds else ""
    time = f'<dd class="mm-ms">{milliseconds(seconds)}</dd>'
    return f'<div><dt>{escape(stage)}</dt><dd class="mm-bar">{bar}</dd>{time}</div>'


def _usage(reply: Reply) -> str:
    cached = f" ({reply.num_cached_tokens:,} of them cached)" if reply.num_cached_tokens else ""
    return (
        f'<p class="mm-note">{reply.num_prompt_tokens:,} prompt{cached} + '
        f"{reply.num_completion_tokens:,} answer tokens, {milliseconds(reply.wall_s)} round trip</p>"
    )


def _code(snippets: Mapping[str, str]) -> str:
    """The request as code, folded; each language with a button that copies it."""
    if not snippets:
        return ""
    parts = "".join(
        f'<div class="mm-snippet"><h3>{escape(language)}</h3>'
        f'<button type="button" aria-label="Copy as {escape(language)}" onclick="{escape(COPY)}">Copy</button>'
        f'<pre tabindex="0" data-language="{escape(language)}">{escape(code)}</pre></div>'
        for language, code in snippets.items()
    )
    return f'<details class="mm-code"><summary>Copy as {", ".join(map(escape, snippets))}</summary>{parts}</details>'


def error(message: str, hint: str = "") -> str:
    small = f"<small>{escape(hint)}</small>" if hint else ""
    return f'<div class="mm-error" role="alert">{escape(message)}{small}</div>'


def savings(all_shown: Sequence[Shown]) -> str:
    """A table with what each reduction saved and whether it changed the answer; empty until there is something."""
    full = all_shown[0].reply if all_shown else None
    if full is None:
        return ""
    rows = "".join(_saving(full, shown.side, shown.reply) for shown in all_shown[1:] if shown.reply)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Saved by", "Tokens", "KV cache", "Time", "Answer"))
    return f'<table class="mm-savings"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>' if rows else ""


def _saving(full: Reply, side: Side, reply: Reply) -> str:
    tokens = kv = time = "unknown"
    if full.num_visual_tokens_kept is not None and reply.num_visual_tokens_kept is not None:
        tokens = f"{full.num_visual_tokens_kept - reply.num_visual_tokens_kept:,}"
    if full.kv_bytes is not None and reply.kv_bytes is not None:
        kv = kibibytes(full.kv_bytes - reply.kv_bytes)
    if full.timings_s and reply.timings_s:
        time = signed_saving(total_s(full), total_s(reply))
    same = "the same" if full.text.strip() == reply.text.strip() else "differs"
    name = f'<th scope="row">{escape(side.title)} <small>{escape(side.detail)}</small></th>'
    return f"<tr>{name}<td>{tokens}</td><td>{kv}</td><td>{time}</td><td>{same}</td></tr>"

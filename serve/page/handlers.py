"""What happens when something on the page is used.

Handlers turn the values of inputs into questions, send them and return fragments of HTML. Every problem becomes a text
on the page.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image

from mm.errors import MmError
from serve.page import cards, views
from serve.page.asking import ask_all
from serve.page.cards import Shown
from serve.page.choices import ReducerChoice
from serve.page.client import Client
from serve.page.form import FULL, Form, Side
from serve.page.link import DRAFTER, LinkReader, to_query, values_of
from serve.page.media import NotMedia, Preview, preview, read_upload
from serve.page.methods import misfits, picker
from serve.page.pictures import dim_slider, plain_pictures, shared_frames
from serve.page.reply import ServerProblem
from serve.page.request import Question, Turn, Upload
from serve.page.samples import Sample

EARLIER_OF_FULL = "Its earlier answers are those with every token."


Update = dict[str, Any]
"""What `gr.update` returns: JSON for the browser."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question of a conversation and the answer of each side.

    Attributes:
        upload: What the question brought, if anything.
    """

    text: str
    upload: Upload | None
    answers: Mapping[Side, str]


@dataclass(kw_only=True)
class Session:
    """What one visitor has asked, and how to stop what is being answered."""

    exchanges: list[Exchange] = field(default_factory=list[Exchange])
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def uploads(self) -> tuple[Upload, ...]:
        return tuple(one.upload for one in self.exchanges if one.upload is not None)

    def turns(self, side: Side) -> tuple[Turn, ...]:
        """The turns so far as one side saw them; a side that is new takes over the answers with every token."""
        return tuple(
            Turn(text=one.text, upload=one.upload, answer=one.answers.get(side, one.answers[FULL]))
            for one in self.exchanges
        )

    def note(self, text: str, upload: Upload | None, shown: Sequence[Shown]) -> None:
        """Keep a question that all sides have answered, if that with every token has."""
        answers = {one.side: one.reply.text for one in shown if one.reply is not None}
        if FULL in answers:
            self.exchanges.append(Exchange(text=text, upload=upload, answers=answers))

    def is_new(self, side: Side) -> bool:
        return any(side not in one.answers for one in self.exchanges)


class Handlers:
    """What happens on the page."""

    def __init__(self, client: Client, samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> None:
        self._client, self._samples, self._choices = client, tuple(samples), tuple(choices)
        self._refusals: dict[str, str] | None = None
        self._drafter: str | None = None
        self.turn = asyncio.Lock()
        """One comparison at a time: two would slow each other down."""

    def load(self, pairs: Sequence[tuple[str, str]]) -> list[object]:
        """The page as its address has it: the first lines, whether to ask at once, and the values of the form."""
        drafters: list[str] = []
        try:
            offer = self._client.offer()
            drafters = list(offer.drafters)
            server = views.server_line(offer.model, self._client.url, offer.limits)
        except ServerProblem as problem:
            server = views.server_down(str(problem))
        self._drafter = next(iter(drafters), None)
        link = LinkReader(self._choices, self._samples, drafters)
        form = link.read(pairs)
        values = values_of(form, self._choices)
        values[DRAFTER] = gr.update(choices=drafters, value=form.drafter, visible=len(drafters) > 1)
        problems = views.problems(link.problems) if link.problems else ""
        return [views.heading(server) + problems, link.is_answerable, *values]

    def link(self, *values: object) -> str:
        """The query of the address that brings these settings back."""
        return to_query(Form.of(values, self._choices), self._choices, self._samples, self._drafter)

    async def first(
        self, is_answerable: bool, session: Session, *values: object
    ) -> AsyncGenerator[tuple[str, str, str, str]]:
        """The answer about a sample that is there at first view."""
        if is_answerable:
            async for shown in self.ask(session, *values):
                yield shown

    def show_upload(self, path: str | None, num_frames: float) -> tuple[Update, Update]:
        """The picture, or the frames that the encoder gets."""
        if path is None:
            return gr.update(value="", visible=False), gr.update(visible=False)
        try:
            upload = read_upload(path)
            shown = preview(upload, int(num_frames))
        except NotMedia as error:
            return gr.update(value=cards.error(str(error)), visible=True), gr.update(visible=False)
        except MmError as error:
            text = cards.error(f"This file cannot be shown: {error}.")
            return gr.update(value=text, visible=True), gr.update()
        is_clip = upload.kind == "video"
        title = f"{len(shown.urls)} frames of the clip" if is_clip else ""
        return gr.update(value=plain_pictures(shown, title), visible=True), gr.update(visible=is_clip)

    def fit(self, path: str | None, chosen: str) -> tuple[str, str]:
        """The methods, with those greyed that do not fit the model or the file; and the names that stay chosen."""
        reasons = misfits(self._choices, self._refused(), _kind_of(path))
        names = [name for name in json.loads(chosen or "[]") if name not in reasons]
        return picker(self._choices, reasons, names), json.dumps(names)

    def _refused(self) -> dict[str, str]:
        """What the model cannot use; asked once."""
        if self._refusals is None:
            try:
                if "image" not in self._client.offer().kinds:
                    return {}
                probe = Question(text="?", upload=_grey())
                self._refusals = self._client.refusals(probe, [choice.name for choice in self._choices])
            except ServerProblem:
                return {}
        return self._refusals

    def show_options(self, chosen: str) -> list[Update]:
        """The budget, and the groups of options of the chosen methods."""
        names = set(json.loads(chosen or "[]"))
        found = [choice for choice in self._choices if choice.name in names]
        groups = [gr.update(visible=choice.name in names) for choice in self._choices if choice.other_options]
        budget = any(choice.has_keep_ratio for choice in found)
        return [gr.update(visible=budget), gr.update(visible=any(one.other_options for one in found)), *groups]

    def take_sample(self, event: gr.SelectData) -> tuple[str, str]:
        sample = self._samples[int(event.index)]
        return str(sample.path), sample.question

    def stop(self, session: Session) -> None:
        """End the answer that is being written."""
        session.stop.set()

    async def ask(self, session: Session, *values: object) -> AsyncGenerator[tuple[str, str, str, str]]:
        """A first question: status, savings, frames and cards, again and again."""
        session.exchanges.clear()
        async for shown in self._ask(session, values):
            yield shown

    async def follow_up(self, session: Session, *values: object) -> AsyncGenerator[tuple[str, str, str, str]]:
        """A question after those before it."""
        if not session.exchanges:
            yield _refusal("There is no answer yet to follow up on. Ask a first question.")
            return
        async for shown in self._ask(session, values):
            yield shown

    async def _ask(self, session: Session, values: Sequence[object]) -> AsyncGenerator[tuple[str, str, str, str]]:
        form = Form.of(values, self._choices)
        try:
            upload = _upload_of(form, session)
            offer = await asyncio.to_thread(self._client.offer)
        except (NotMedia, ServerProblem) as problem:
            yield _refusal(str(problem))
            return
        sides = form.sides(self._choices)
        questions = [form.asked(side, upload, session.turns(side)) for side in sides]
        expected = None if session.exchanges else self._expected(upload, form.question.strip())
        start = [
            Shown(
                side=side,
                turns=session.turns(side),
                expected=expected,
                note=EARLIER_OF_FULL if session.is_new(side) else "",
            )
            for side in sides
        ]
        previews, frames = await asyncio.to_thread(_previews, questions[0])
        session.stop.set()  # what is still being answered
        session.stop = stop = asyncio.Event()
        if self.turn.locked():
            yield views.status("Waiting until another comparison is done."), "", frames, cards.cards(start, previews)
        async with self.turn, aclosing(ask_all(self._client, offer.model, questions, start, stop)) as steps:
            async for shown in steps:
                if session.stop is not stop:
                    return
                if not any(one.is_busy for one in shown):  # a follow-up may be asked as soon as this is seen
                    session.note(questions[0].text, upload, shown)
                yield _status(shown), cards.savings(shown), frames, cards.cards(shown, previews)

    def _expected(self, upload: Upload | None, question: str) -> str | None:
        for sample in self._samples:
            if upload and sample.path.name == upload.name and sample.question == question and sample.path.is_file():
                return sample.answer if sample.path.read_bytes() == upload.data else None
        return None


def _upload_of(form: Form, session: Session) -> Upload | None:
    """The file that the question brings; None where it is the one that the conversation has.

    Raises:
        NotMedia: Something that a question needs is missing.
    """
    if form.path is None and not session.exchanges:
        raise NotMedia("Choose a picture or a clip first.")
    if not form.question.strip():
        raise NotMedia("Write a question first.")
    upload = None if form.path is None else read_upload(form.path)
    return None if upload in session.uploads[-1:] else upload


def _previews(question: Question) -> tuple[list[Preview], str]:
    """Of all files of the conversation, and the style sheet with them; none where one cannot be shown."""
    try:
        found = [preview(upload, question.num_frames) for upload in question.uploads]
    except MmError:
        return [], ""
    return found, shared_frames(found)


def _status(shown: Sequence[Shown]) -> str:
    busy = next((i for i, one in enumerate(shown) if one.is_busy), None)
    if busy is None:
        done = sum(one.reply is not None for one in shown)
        slider = dim_slider() if any(one.reply and one.reply.kept for one in shown) else ""
        return f'<div class="mm-line">{views.status(f"{done} of {len(shown)} answers.")}{slider}</div>'
    text = f"Answer {busy + 1} of {len(shown)}: {shown[busy].side.title}"
    return f'<div class="mm-line">{views.status(text)}</div>'


def _refusal(text: str) -> tuple[str, str, str, str]:
    return cards.error(text), "", "", ""


def _kind_of(path: str | None) -> str | None:
    try:
        return None if path is None else read_upload(path).kind
    except NotMedia:
        return None


def _grey() -> Upload:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
    return Upload(name="grey.png", mime="image/png", data=buffer.getvalue())

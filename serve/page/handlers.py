"""What happens when something on the page is used.

Handlers turn the values of inputs into a `Question`, send it twice and return fragments of `views`. Every problem
becomes a text on the page.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from mm.errors import MmError
from serve.page import views
from serve.page.choices import ReducerChoice
from serve.page.client import Client, Question, Reply, ServerProblem, Upload
from serve.page.form import Form
from serve.page.media import NotMedia, Preview, preview, read_upload
from serve.page.samples import Sample

LEFT_OUT = "The server's own reducer, or divprune, keeps this share"
WRITTEN_OUT = "Sent as written, such as: uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5"


Update = dict[str, Any]
"""What `gr.update` returns: JSON for the browser."""


class Handlers:
    """What happens on the page. Holds no state of a visitor."""

    def __init__(self, client: Client, samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> None:
        self._client, self._samples, self._choices = client, tuple(samples), tuple(choices)

    def heading(self) -> tuple[str, Update]:
        """The first line, with the server or the reason why it cannot be reached, and the drafters to choose from."""
        try:
            offer = self._client.offer()
        except ServerProblem as problem:
            return views.heading(views.server_down(str(problem))), gr.update()
        drafters = list(offer.drafters)
        chosen = gr.update(choices=drafters, value=next(iter(drafters), None), visible=len(drafters) > 1)
        return views.heading(views.server_line(offer.model, self._client.url, offer.limits)), chosen

    def show_upload(self, path: str | None, num_frames: float) -> tuple[Update, Update]:
        """The picture, or the frames that the encoder gets."""
        if path is None:
            return gr.update(value="", visible=False), gr.update(visible=False)
        try:
            upload = read_upload(path)
            shown = preview(upload, int(num_frames))
        except NotMedia as error:
            return gr.update(value=views.error(str(error)), visible=True), gr.update(visible=False)
        except MmError as error:
            text = views.error(f"This file cannot be shown: {error}.")
            return gr.update(value=text, visible=True), gr.update()
        is_clip = upload.kind == "video"
        title = f"{len(shown.urls)} frames of the clip" if is_clip else ""
        return gr.update(value=views.plain_pictures(shown, title), visible=True), gr.update(visible=is_clip)

    def show_options(self, reducer: str) -> list[Update]:
        """Show the inputs of the chosen reducer: its summary, its budget, its group of options."""
        choice = next((choice for choice in self._choices if choice.name == reducer), None)
        if choice is None and not reducer.strip():
            choice = ReducerChoice(name="", summary=LEFT_OUT, options={"keep_ratio": None})
        if choice is None:
            choice = ReducerChoice(name="", summary=WRITTEN_OUT)
        with_options = [other.name for other in self._choices if other.other_options]
        groups = [gr.update(visible=name == choice.name) for name in with_options]
        return [gr.update(info=choice.summary), gr.update(visible=choice.has_keep_ratio), *groups]

    def take_sample(self, event: gr.SelectData) -> tuple[str, str]:
        sample = self._samples[int(event.index)]
        return str(sample.path), sample.question

    def ask(self, *values: object) -> Iterator[tuple[Update | str, ...]]:
        """Both answers, each as soon as it has come."""
        form = Form.of(values, self._choices)
        hidden, folded = gr.update(value="", visible=False), gr.update(visible=False)
        try:
            upload = _required(form)
        except NotMedia as error:
            card = views.error_card(views.FULL, "", str(error))
            yield hidden, card, views.waiting_card(views.REDUCED, "Nothing was asked."), hidden, folded, ""
            return
        full_question, reduced_question = form.questions(upload, self._choices)
        expected = self._expected(upload, full_question.text)
        busy = views.waiting_card(views.FULL, "Asking with every visual token", busy=True)
        yield hidden, busy, views.waiting_card(views.REDUCED, "Next"), hidden, folded, ""
        full = self._answer(full_question)
        busy = views.waiting_card(views.REDUCED, "Asking with fewer", busy=True)
        yield hidden, _card_of(views.FULL, full_question, full, full, expected), busy, hidden, folded, ""
        reduced = self._answer(reduced_question)
        curl = self._curl(reduced_question)
        yield (
            _summary_of(full, reduced),
            _card_of(views.FULL, full_question, full, reduced, expected),
            _card_of(views.REDUCED, reduced_question, reduced, full, expected),
            _map_of(reduced_question, reduced),
            gr.update(visible=bool(curl)),
            curl,
        )

    def _answer(self, question: Question) -> Reply | ServerProblem:
        """The answer with cold caches: a question that is asked twice would find its own prompt, and look faster."""
        try:
            return self._client.ask(replace(question, salt=uuid.uuid4().hex))
        except ServerProblem as problem:
            return problem

    def _curl(self, question: Question) -> str:
        try:
            return self._client.curl(question)
        except ServerProblem:
            return ""

    def _expected(self, upload: Upload, question: str) -> str | None:
        for sample in self._samples:
            if sample.path.name == upload.name and sample.question == question and sample.path.is_file():
                return sample.answer if sample.path.read_bytes() == upload.data else None
        return None


def _required(form: Form) -> Upload:
    """The upload, if the form has everything that a question needs."""
    if form.path is None:
        raise NotMedia("Choose an image or a clip first.")
    if not form.question.strip():
        raise NotMedia("Write a question first.")
    return read_upload(form.path)


def _detail(question: Question) -> str:
    if question.reducer == "none":
        return "no reduction"
    name = question.reducer or "the server's reducer"
    return name if question.keep_ratio is None else f"{name}, keep {question.keep_ratio:.0%}"


def _card_of(
    side: str, question: Question, result: Reply | ServerProblem, other: Reply | ServerProblem, expected: str | None
) -> str:
    if isinstance(result, ServerProblem):
        return views.error_card(side, _detail(question), result.message, result.hint)
    scale_s = views.longest_stage_s(result, other if isinstance(other, Reply) else None)
    return views.answer_card(side, _detail(question), result, scale_s, expected)


def _summary_of(full: Reply | ServerProblem, reduced: Reply | ServerProblem) -> Any:
    if isinstance(full, Reply) and isinstance(reduced, Reply):
        return gr.update(value=views.comparison(full, reduced), visible=True)
    return gr.update(value="", visible=False)


def _map_of(question: Question, reduced: Reply | ServerProblem) -> Any:
    """The kept tokens over the pictures, where the server reported them."""
    if not isinstance(reduced, Reply) or not reduced.kept:
        return gr.update(value="", visible=False)
    try:
        shown: Preview = preview(question.upload, question.num_frames)
    except MmError as error:
        return gr.update(value=views.error(f"The map cannot be drawn: {error}."), visible=True)
    title = "What the reduced answer saw"
    return gr.update(value=views.kept_pictures(shown, reduced.kept[0], title), visible=True)

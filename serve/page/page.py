"""The page: its components, and what happens when one is used.

Handlers turn component values into an `Ask`, send it twice and hand out fragments of `views`. Every problem becomes a
text on the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from mm.errors import MmError
from serve.page import views
from serve.page.choices import DEFAULT_REDUCER, ReducerChoice, installed_reducers, reducer_spec, written
from serve.page.client import Ask, Client, Reply, ServerProblem, Upload
from serve.page.media import NotMedia, Preview, preview, read_upload, thumbnail
from serve.page.samples import Sample

MAX_FRAMES = 32
WRITTEN_OUT = "Sent as written, such as: uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The values of the page's inputs, in the order in which Gradio hands them over; the options come last.

    Attributes:
        options: Of the chosen reducer, beside its budget.
    """

    path: str | None
    question: str
    reducer: str
    keep_ratio: float
    drafter: str | None
    num_frames: float
    seed: float | None
    temperature: float
    max_tokens: float
    options: Mapping[str, Any]

    @classmethod
    def of(cls, values: Sequence[Any], choices: Sequence[ReducerChoice]) -> Form:
        """From what Gradio hands over: `Inputs.form`."""
        names = [field.name for field in fields(cls) if field.name != "options"]
        form = dict(zip(names, values, strict=False))
        given = zip(option_keys(choices), values[len(names) :], strict=True)
        chosen = {option: value for (reducer, option), value in given if reducer == form["reducer"].strip()}
        return cls(**form, options=chosen)

    def asks(self, upload: Upload, choices: Sequence[ReducerChoice]) -> tuple[Ask, Ask]:
        """The full and the reduced question; the same in everything else."""
        spec, keep_ratio = reducer_spec(self.reducer, self.keep_ratio, self.options, choices)
        full = Ask(
            question=self.question.strip(),
            upload=upload,
            drafter=self.drafter or None,
            num_frames=int(self.num_frames),
            seed=int(self.seed or 0),
            temperature=float(self.temperature),
            max_tokens=int(self.max_tokens),
        )
        return full, replace(full, reducer=spec, keep_ratio=keep_ratio)


def option_keys(choices: Sequence[ReducerChoice]) -> list[tuple[str, str]]:
    """(reducer, option) of every input for an option, in their order on the page."""
    return [(choice.name, option) for choice in choices for option in choice.other_options]


def build_page(
    client: Client, *, samples: Sequence[Sample] = (), reducers: Sequence[ReducerChoice] | None = None
) -> gr.Blocks:
    """The page, not yet served.

    Args:
        client: The server that is asked.
        samples: Ready-made questions; none leaves their row out.
        reducers: What to choose from; None takes those installed here.
    """
    choices = installed_reducers() if reducers is None else tuple(reducers)
    handlers = Handlers(client, samples, choices)
    # Uploads older than an hour go, looked for every ten minutes.
    with gr.Blocks(title="mm", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        head = gr.HTML(views.heading(), elem_classes="mm-bare", elem_id="mm-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320, elem_classes="mm-side"):
                inputs = _inputs(samples, choices)
            with gr.Column(scale=7, min_width=320):
                outputs = _outputs()
        _wire(page, handlers, inputs, outputs, head)
    return page


@dataclass(frozen=True, kw_only=True)
class Inputs:
    file: gr.File
    shown: gr.HTML
    samples: gr.Gallery | None
    question: gr.Textbox
    button: gr.Button
    reducer: gr.Dropdown
    keep_ratio: gr.Slider
    groups: dict[str, gr.Group]
    options: list[Any]
    drafter: gr.Dropdown
    num_frames: gr.Slider
    seed: gr.Number
    temperature: gr.Slider
    max_tokens: gr.Slider

    @property
    def form(self) -> list[Any]:
        """The components of `Form`, in its order."""
        chosen = [self.file, self.question, self.reducer, self.keep_ratio, self.drafter]
        return [*chosen, self.num_frames, self.seed, self.temperature, self.max_tokens, *self.options]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    summary: gr.HTML
    full: gr.HTML
    reduced: gr.HTML
    kept: gr.HTML
    command: gr.Accordion
    curl: gr.Code

    @property
    def all(self) -> list[Any]:
        return [self.summary, self.full, self.reduced, self.kept, self.command, self.curl]


def _inputs(samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> Inputs:
    file = gr.File(label="Image or clip", file_types=["image", "video"], type="filepath", height=128, elem_id="mm-file")
    shown = gr.HTML(visible=False, elem_classes="mm-bare", elem_id="mm-shown")
    gallery = _sample_gallery(samples) if samples else None
    question = gr.Textbox(
        label="Question", placeholder="What is in the picture?", lines=1, max_lines=4, elem_id="mm-question"
    )
    button = gr.Button("Ask twice", variant="primary", elem_id="mm-ask")
    first = next((c for c in choices if c.name == DEFAULT_REDUCER), choices[0] if choices else ReducerChoice(name=""))
    with gr.Group():
        reducer = gr.Dropdown(
            [choice.name for choice in choices],
            value=first.name,
            label="Reducer",
            info=first.summary,
            allow_custom_value=True,
            elem_id="mm-reducer",
        )
        keep_ratio = gr.Slider(
            0.01,
            1,
            value=first.options.get("keep_ratio", 0.25),
            step=0.01,
            label="Share of visual tokens to keep",
            visible=first.has_keep_ratio,
            elem_id="mm-keep-ratio",
        )
        num_frames = gr.Slider(
            1, MAX_FRAMES, value=8, step=1, label="Frames of the clip", visible=False, elem_id="mm-frames"
        )
    groups, options = _option_inputs(choices, first.name)
    drafter = gr.Dropdown(
        [],
        value=None,
        label="Drafter",
        info="Proposes tokens ahead; the answer is the same with any.",
        visible=False,
        elem_id="mm-drafter",
    )
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest token."
        )
        max_tokens = gr.Slider(1, 512, value=64, step=1, label="Answer tokens at most")
        seed = gr.Number(value=0, precision=0, label="Seed", info="The same for both answers.")
    return Inputs(
        file=file,
        shown=shown,
        samples=gallery,
        question=question,
        button=button,
        reducer=reducer,
        keep_ratio=keep_ratio,
        groups=groups,
        options=options,
        drafter=drafter,
        num_frames=num_frames,
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
    )


def _option_inputs(choices: Sequence[ReducerChoice], shown: str) -> tuple[dict[str, gr.Group], list[Any]]:
    """One group per reducer that has options beside its budget, and all their inputs in the order of `option_keys`."""
    groups: dict[str, gr.Group] = {}
    inputs: list[Any] = []
    for choice in choices:
        if not choice.other_options:
            continue
        with gr.Group(visible=choice.name == shown, elem_id=f"mm-options-{choice.name}") as group:
            inputs += [_option_input(choice, option, default) for option, default in choice.other_options.items()]
        groups[choice.name] = group
    return groups, inputs


def _option_input(choice: ReducerChoice, option: str, default: Any) -> Any:
    """An input for what the option's default is: yes or no, a number, or text."""
    said: dict[str, Any] = {
        "label": option,
        "info": choice.help.get(option),
        "elem_id": f"mm-option-{choice.name}-{option}",
    }
    if isinstance(default, bool):
        return gr.Checkbox(default, **said)
    if isinstance(default, int | float):
        return gr.Number(default, precision=0 if isinstance(default, int) else None, **said)
    return gr.Textbox(written(default), max_lines=1, **said)


def _sample_gallery(samples: Sequence[Sample]) -> gr.Gallery:
    thumbnails = [(thumbnail(read_upload(sample.path)), sample.question) for sample in samples]
    return gr.Gallery(
        value=thumbnails,
        show_label=False,
        columns=max(4, len(samples)),
        allow_preview=False,
        interactive=False,
        object_fit="cover",
        buttons=[],
        elem_classes="mm-samples",
        elem_id="mm-samples",
    )


def _outputs() -> Outputs:
    summary = gr.HTML(visible=False, elem_classes="mm-bare", elem_id="mm-summary")
    with gr.Row(equal_height=True, elem_classes="mm-answers"):
        full = gr.HTML(
            views.waiting_card(views.FULL, "The answer with all visual tokens."),
            elem_classes="mm-bare",
            elem_id="mm-full",
            min_width=280,
        )
        reduced = gr.HTML(
            views.waiting_card(views.REDUCED, "The answer with the tokens that the reducer keeps."),
            elem_classes="mm-bare",
            elem_id="mm-reduced",
            min_width=280,
        )
    kept = gr.HTML(visible=False, elem_classes="mm-bare", elem_id="mm-kept")
    with gr.Accordion("The reduced question as curl", open=False, visible=False) as command:
        curl = gr.Code(
            language="shell",
            interactive=False,
            show_label=False,
            buttons=["copy"],
            lines=3,
            max_lines=14,
            elem_id="mm-curl",
            wrap_lines=True,
        )
    return Outputs(summary=summary, full=full, reduced=reduced, kept=kept, command=command, curl=curl)


def _wire(page: gr.Blocks, handlers: Handlers, inputs: Inputs, outputs: Outputs, head: gr.HTML) -> None:
    # Private: the page is for people; programs have the server's own API.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    page.load(handlers.heading, None, [head, inputs.drafter], **quiet)
    gr.on(
        [inputs.file.change, inputs.num_frames.release],
        handlers.show_upload,
        [inputs.file, inputs.num_frames],
        [inputs.shown, inputs.num_frames],
        **quiet,
    )
    inputs.reducer.change(
        handlers.show_options, inputs.reducer, [inputs.reducer, inputs.keep_ratio, *inputs.groups.values()], **quiet
    )
    if inputs.samples is not None:
        inputs.samples.select(handlers.take_sample, None, [inputs.file, inputs.question], **quiet)
    gr.on([inputs.button.click, inputs.question.submit], handlers.ask, inputs.form, outputs.all, **quiet)


class Handlers:
    """What happens on the page. Holds no state of a visitor."""

    def __init__(self, client: Client, samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> None:
        self._client, self._samples, self._choices = client, tuple(samples), tuple(choices)

    def heading(self) -> tuple[str, Any]:
        """The first line, with who is asked or why nobody can be; and the drafters to choose from, if there are any."""
        try:
            offer = self._client.offer()
        except ServerProblem as problem:
            return views.heading(views.server_down(str(problem))), gr.update()
        drafters = list(offer.drafters)
        chosen = gr.update(choices=drafters, value=next(iter(drafters), None), visible=len(drafters) > 1)
        return views.heading(views.server_line(offer.model, self._client.url)), chosen

    def show_upload(self, path: str | None, num_frames: float) -> tuple[Any, Any]:
        """The picture, or the frames that will be looked at."""
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

    def show_options(self, reducer: str) -> list[Any]:
        """The inputs that the chosen reducer has a use for: its line, its budget, each reducer's group of options."""
        choice = next((choice for choice in self._choices if choice.name == reducer), None)
        if choice is None:
            choice = ReducerChoice(name="", summary=WRITTEN_OUT)
        with_options = [other.name for other in self._choices if other.other_options]
        groups = [gr.update(visible=name == choice.name) for name in with_options]
        return [gr.update(info=choice.summary), gr.update(visible=choice.has_keep_ratio), *groups]

    def take_sample(self, event: gr.SelectData) -> tuple[str, str]:
        sample = self._samples[int(event.index)]
        return str(sample.path), sample.question

    def ask(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Both answers, each as soon as it is there."""
        form = Form.of(values, self._choices)
        hidden, folded = gr.update(value="", visible=False), gr.update(visible=False)
        try:
            upload = _required(form)
        except NotMedia as error:
            card = views.error_card(views.FULL, "", str(error))
            yield hidden, card, views.waiting_card(views.REDUCED, "Nothing was asked."), hidden, folded, ""
            return
        full_ask, reduced_ask = form.asks(upload, self._choices)
        expected = self._expected(upload, full_ask.question)
        busy = views.waiting_card(views.FULL, "Asking with every visual token", busy=True)
        yield hidden, busy, views.waiting_card(views.REDUCED, "Next"), hidden, folded, ""
        full = self._answer(full_ask)
        busy = views.waiting_card(views.REDUCED, "Asking with fewer", busy=True)
        yield hidden, _card_of(views.FULL, full_ask, full, full, expected), busy, hidden, folded, ""
        reduced = self._answer(reduced_ask)
        curl = self._curl(reduced_ask)
        yield (
            _summary_of(full, reduced),
            _card_of(views.FULL, full_ask, full, reduced, expected),
            _card_of(views.REDUCED, reduced_ask, reduced, full, expected),
            _map_of(reduced_ask, reduced),
            gr.update(visible=bool(curl)),
            curl,
        )

    def _answer(self, ask: Ask) -> Reply | ServerProblem:
        try:
            return self._client.ask(ask)
        except ServerProblem as problem:
            return problem

    def _curl(self, ask: Ask) -> str:
        try:
            return self._client.curl(ask)
        except ServerProblem:
            return ""

    def _expected(self, upload: Upload, question: str) -> str | None:
        for sample in self._samples:
            if sample.path.name == upload.name and sample.question == question and sample.path.is_file():
                return sample.answer if sample.path.read_bytes() == upload.data else None
        return None


def _required(form: Form) -> Upload:
    """The upload, once everything is there that a question needs."""
    if form.path is None:
        raise NotMedia("Choose an image or a clip first.")
    if not form.question.strip():
        raise NotMedia("Write a question first.")
    return read_upload(form.path)


def _detail(ask: Ask) -> str:
    if ask.reducer == "none":
        return "no reduction"
    return ask.reducer if ask.keep_ratio is None else f"{ask.reducer}, keep {ask.keep_ratio:.0%}"


def _card_of(
    side: str, ask: Ask, result: Reply | ServerProblem, other: Reply | ServerProblem, expected: str | None
) -> str:
    if isinstance(result, ServerProblem):
        return views.error_card(side, _detail(ask), result.message, result.hint)
    scale_s = views.longest_stage_s(result, other if isinstance(other, Reply) else None)
    return views.answer_card(side, _detail(ask), result, scale_s, expected)


def _summary_of(full: Reply | ServerProblem, reduced: Reply | ServerProblem) -> Any:
    if isinstance(full, Reply) and isinstance(reduced, Reply):
        return gr.update(value=views.comparison(full, reduced), visible=True)
    return gr.update(value="", visible=False)


def _map_of(ask: Ask, reduced: Reply | ServerProblem) -> Any:
    """The kept tokens over the pictures, where the server reported them."""
    if not isinstance(reduced, Reply) or not reduced.kept:
        return gr.update(value="", visible=False)
    try:
        shown: Preview = preview(ask.upload, ask.num_frames)
    except MmError as error:
        return gr.update(value=views.error(f"The map cannot be drawn: {error}."), visible=True)
    title = "What the reduced answer saw"
    return gr.update(value=views.kept_pictures(shown, reduced.kept[0], title), visible=True)

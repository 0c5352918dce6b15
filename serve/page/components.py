"""The components of the page: inputs on the left, outputs on the right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from serve.page import views
from serve.page.choices import DEFAULT_REDUCER, ReducerChoice, written
from serve.page.link import MAX_FRAMES
from serve.page.media import read_upload, thumbnail
from serve.page.methods import ON_CHANGE, picker
from serve.page.samples import Sample


@dataclass(frozen=True, kw_only=True)
class Inputs:
    file: gr.File
    shown: gr.HTML
    samples: gr.Gallery | None
    question: gr.Textbox
    ask: gr.Button
    follow_up: gr.Button
    stop: gr.Button
    methods: gr.HTML
    chosen: gr.Textbox
    written: gr.Textbox
    keep_ratio: gr.Slider
    all_options: gr.Accordion
    groups: dict[str, gr.Group]
    options: list[Any]
    drafter: gr.Dropdown
    num_frames: gr.Slider
    seed: gr.Number
    temperature: gr.Slider
    max_tokens: gr.Slider

    @property
    def form(self) -> list[Component]:
        """The components of `Form`, in its order."""
        chosen = [self.file, self.question, self.chosen, self.written, self.keep_ratio, self.drafter]
        return [*chosen, self.num_frames, self.seed, self.temperature, self.max_tokens, *self.options]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    status: gr.HTML
    savings: gr.HTML
    frames: gr.HTML
    answers: gr.HTML

    @property
    def all(self) -> list[Component]:
        return [self.status, self.savings, self.frames, self.answers]


def make_inputs(samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> Inputs:
    gallery = _sample_gallery(samples) if samples else None
    file = gr.File(
        label="Picture or clip", file_types=["image", "video"], type="filepath", height=110, elem_id="mm-file"
    )
    shown = gr.HTML(visible=False, elem_classes="mm-bare", elem_id="mm-shown")
    num_frames = gr.Slider(
        1, MAX_FRAMES, value=8, step=1, label="Frames of the clip", visible=False, elem_id="mm-frames"
    )
    question = gr.Textbox(
        label="Question", placeholder="What is in the picture?", lines=1, max_lines=4, elem_id="mm-question"
    )
    with gr.Row(elem_classes="mm-buttons"):
        ask = gr.Button("Ask", variant="primary", elem_id="mm-ask", min_width=80)
        follow_up = gr.Button("Follow up", elem_id="mm-follow-up", min_width=80)
        stop = gr.Button("Stop", elem_id="mm-stop", min_width=60)
    methods, chosen, written, keep_ratio = _method_inputs(choices)
    with gr.Accordion("Options of the methods", open=False, elem_id="mm-options") as all_options:
        groups, options = _option_inputs(choices, DEFAULT_REDUCER)
    with gr.Accordion("Drafting and sampling", open=False, elem_id="mm-sampling"):
        drafter = _drafter_input()
        temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest token."
        )
        max_tokens = gr.Slider(1, 512, value=64, step=1, label="Answer tokens at most", elem_id="mm-max-tokens")
        seed = gr.Number(value=0, precision=0, label="Seed", info="The same for all answers.")
    return Inputs(
        file=file,
        shown=shown,
        samples=gallery,
        question=question,
        ask=ask,
        follow_up=follow_up,
        stop=stop,
        methods=methods,
        chosen=chosen,
        written=written,
        keep_ratio=keep_ratio,
        all_options=all_options,
        groups=groups,
        options=options,
        drafter=drafter,
        num_frames=num_frames,
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
    )


def _method_inputs(choices: Sequence[ReducerChoice]) -> tuple[gr.HTML, gr.Textbox, gr.Textbox, gr.Slider]:
    """The methods with the names of those chosen, others that are written out, and the budget."""
    first = [choice.name for choice in choices if choice.name == DEFAULT_REDUCER]
    with gr.Accordion("Methods beside every token", open=True, elem_id="mm-choice"):
        keep_ratio = gr.Slider(
            0.01, 1, value=0.25, step=0.01, label="Share of visual tokens to keep", elem_id="mm-keep-ratio"
        )
        methods = gr.HTML(
            picker(choices, {}, first), js_on_load=ON_CHANGE, elem_classes="mm-bare", elem_id="mm-methods"
        )
        chosen = gr.Textbox(json.dumps(first), visible=False, elem_id="mm-chosen")
        written = gr.Textbox(
            label="Others, one a line",
            info="Sent as written, each with its own options.",
            placeholder="divprune:keep_ratio=0.1\nuniform:keep_ratio=0.5 + divprune:keep_ratio=0.5",
            lines=2,
            max_lines=6,
            elem_id="mm-written",
        )
    return methods, chosen, written, keep_ratio


def _drafter_input() -> gr.Dropdown:
    return gr.Dropdown(
        [],
        value=None,
        label="Drafter",
        info="Proposes tokens ahead; the answer is the same with any.",
        visible=False,
        elem_id="mm-drafter",
    )


def _option_inputs(choices: Sequence[ReducerChoice], shown: str) -> tuple[dict[str, gr.Group], list[Any]]:
    """One group per reducer with options beside its budget, and all their inputs in the order of `option_keys`."""
    groups: dict[str, gr.Group] = {}
    inputs: list[Any] = []
    for choice in choices:
        if not choice.other_options:
            continue
        with gr.Group(visible=choice.name == shown, elem_id=f"mm-options-{choice.name}") as group:
            gr.HTML(
                f'<h2 class="mm-title">{choice.name}</h2><p class="mm-about">{escape(choice.summary)}</p>', padding=True
            )
            inputs += [_option_input(choice, option, default) for option, default in choice.other_options.items()]
        groups[choice.name] = group
    return groups, inputs


def _option_input(choice: ReducerChoice, option: str, default: Any) -> Any:
    """An input by the type of the option's default: a check box, a number, or a text."""
    common: dict[str, Any] = {
        "label": option,
        "info": choice.help.get(option),
        "elem_id": f"mm-option-{choice.name}-{option}",
    }
    if isinstance(default, bool):
        return gr.Checkbox(default, **common)
    if isinstance(default, int | float):
        return gr.Number(default, precision=0 if isinstance(default, int) else None, **common)
    return gr.Textbox(written(default), max_lines=1, **common)


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


def make_outputs() -> Outputs:
    def part(name: str, value: str = "") -> gr.HTML:
        return gr.HTML(value, elem_classes="mm-bare", elem_id=f"mm-{name}")

    frames = part("item-frames")
    status = part("status", views.status("Choose a picture or a clip, and ask."))
    return Outputs(status=status, savings=part("savings"), frames=frames, answers=part("answers"))

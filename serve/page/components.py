"""The components of the page: inputs on the left, outputs on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from serve.page import views
from serve.page.choices import DEFAULT_REDUCER, ReducerChoice, written
from serve.page.media import read_upload, thumbnail
from serve.page.samples import Sample

MAX_FRAMES = 32


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
    def form(self) -> list[Component]:
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
    def all(self) -> list[Component]:
        shown: list[Any] = [self.summary, self.full, self.reduced, self.kept, self.command, self.curl]
        return shown


def make_inputs(samples: Sequence[Sample], choices: Sequence[ReducerChoice]) -> Inputs:
    file = gr.File(label="Image or clip", file_types=["image", "video"], type="filepath", height=128, elem_id="mm-file")
    shown = gr.HTML(visible=False, elem_classes="mm-bare", elem_id="mm-shown")
    gallery = _sample_gallery(samples) if samples else None
    question = gr.Textbox(
        label="Question", placeholder="What is in the picture?", lines=1, max_lines=4, elem_id="mm-question"
    )
    button = gr.Button("Ask twice", variant="primary", elem_id="mm-ask")
    reducer, keep_ratio, num_frames, groups, options = _reducer_inputs(choices)
    drafter = _drafter_input()
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


def _reducer_inputs(
    choices: Sequence[ReducerChoice],
) -> tuple[gr.Dropdown, gr.Slider, gr.Slider, dict[str, gr.Group], list[Any]]:
    """The reducer, its budget, the frames of a clip, and the reducers' other options."""
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
    return reducer, keep_ratio, num_frames, groups, options


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

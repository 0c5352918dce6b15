"""The page: which components it has, and which handler each of them calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.page import views
from serve.page.choices import ReducerChoice, installed_reducers
from serve.page.client import Client
from serve.page.components import Inputs, Outputs, make_inputs, make_outputs
from serve.page.handlers import Handlers
from serve.page.samples import Sample

SHOW_ANSWERS = """() => {
  const answers = document.querySelector("#mm-full");
  if (answers && window.innerWidth <= 700) answers.scrollIntoView({ block: "start" });
}"""
"""On a narrow screen the answers are below the form."""


def build_page(
    client: Client, *, samples: Sequence[Sample] = (), reducers: Sequence[ReducerChoice] | None = None
) -> gr.Blocks:
    """The page, not yet served.

    Args:
        client: The server that is asked.
        samples: Ready-made questions; the gallery is left out if there are none.
        reducers: What to choose from; None takes those installed here.
    """
    choices = installed_reducers() if reducers is None else tuple(reducers)
    handlers = Handlers(client, samples, choices)
    # Uploads older than an hour go, looked for every ten minutes.
    with gr.Blocks(title="mm", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        head = gr.HTML(views.heading(), elem_classes="mm-bare", elem_id="mm-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320, elem_classes="mm-side"):
                inputs = make_inputs(samples, choices)
            with gr.Column(scale=7, min_width=320):
                outputs = make_outputs()
        _wire(page, handlers, inputs, outputs, head)
    return page


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
    asked = [inputs.button.click, inputs.question.submit]
    gr.on(asked, handlers.ask, inputs.form, outputs.all, **quiet)
    gr.on(asked, None, None, None, js=SHOW_ANSWERS, **quiet)

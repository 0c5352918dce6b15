"""The page: which components it has, and which handler each of them calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from serve.page import views
from serve.page.choices import ReducerChoice, installed_reducers
from serve.page.client import Client
from serve.page.components import Inputs, Outputs, make_inputs, make_outputs
from serve.page.endpoints import Endpoints, add_endpoints
from serve.page.handlers import Handlers, Session
from serve.page.methods import CHOSEN
from serve.page.samples import Sample

SHOW_ANSWERS = """() => {
  const answers = document.querySelector("#mm-status");
  if (answers && window.innerWidth <= 700) answers.scrollIntoView({ block: "start" });
}"""
"""On a narrow screen the answers are below the form."""

SET_ADDRESS = """(query) => {
  const kept = [...new URLSearchParams(location.search)].filter(([name]) => name.startsWith("__"));
  const all = new URLSearchParams([...kept, ...new URLSearchParams(query)]);
  history.replaceState(null, "", "?" + all);
}"""
"""The settings in the address, so that it can be sent as a link."""


def with_chosen(place: int) -> str:
    """A function for the browser that puts the boxes checked now among an event's inputs.

    The component that holds them is set by events of its own, which a quick click on a button overtakes.
    """
    return f"(...inputs) => {{ inputs[{place}] = ({CHOSEN})(); return inputs; }}"


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
        with gr.Row(equal_height=False, elem_classes="mm-page"):
            with gr.Column(scale=4, min_width=300, elem_classes="mm-side"):
                inputs = make_inputs(samples, choices)
            with gr.Column(scale=8, min_width=300, elem_classes="mm-main"):
                outputs = make_outputs()
        session = gr.State(Session(), time_to_live=3600)
        add_endpoints(Endpoints(client, choices, handlers.turn))
        _wire(page, handlers, inputs, outputs, head, session)
    return page


def _wire(
    page: gr.Blocks, handlers: Handlers, inputs: Inputs, outputs: Outputs, head: gr.HTML, session: gr.State
) -> None:
    # Private: programs have the server's own API, and the named endpoints.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    is_answerable, link = gr.State(False), gr.Textbox(visible=False)

    def load(request: gr.Request) -> list[object]:
        return handlers.load(request.query_params.multi_items())

    fit: Any = [handlers.fit, [inputs.file, inputs.chosen], [inputs.methods, inputs.chosen]]
    loaded = page.load(load, None, [head, is_answerable, *inputs.form], **quiet)
    loaded.then(*fit, **quiet).then(handlers.first, [is_answerable, session, *inputs.form], outputs.all, **quiet)
    gr.on(
        [inputs.file.change, inputs.num_frames.release],
        handlers.show_upload,
        [inputs.file, inputs.num_frames],
        [inputs.shown, inputs.num_frames],
        **quiet,
    )
    inputs.file.change(*fit, **quiet)
    inputs.methods.change(None, None, inputs.chosen, js=CHOSEN, **quiet)
    shown = [inputs.keep_ratio, inputs.all_options, *inputs.groups.values()]
    inputs.chosen.change(handlers.show_options, inputs.chosen, shown, **quiet)
    if inputs.samples is not None:
        inputs.samples.select(handlers.take_sample, None, [inputs.file, inputs.question], **quiet)
    asked, place = [inputs.ask.click, inputs.question.submit], inputs.form.index(inputs.chosen)
    gr.on(asked, handlers.ask, [session, *inputs.form], outputs.all, js=with_chosen(1 + place), **quiet)
    inputs.follow_up.click(handlers.follow_up, [session, *inputs.form], outputs.all, **quiet)
    inputs.stop.click(handlers.stop, session, None, queue=False, **quiet)
    all_asked = [*asked, inputs.follow_up.click]
    gr.on(all_asked, None, None, None, js=SHOW_ANSWERS, **quiet)
    linked = gr.on(all_asked, handlers.link, inputs.form, link, queue=False, js=with_chosen(place), **quiet)
    linked.then(None, link, None, js=SET_ADDRESS, **quiet)

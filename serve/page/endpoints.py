"""The page's named endpoints, for `gradio_client`: the same comparison, as data.

client = gradio_client.Client("http://127.0.0.1:7860")
client.predict(handle_file("cat.png"), "What is it?", ["divprune", "fastv"], api_name="/compare")
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from serve.page.asking import ask_all
from serve.page.cards import Shown, total_s
from serve.page.choices import ReducerChoice
from serve.page.client import Client
from serve.page.form import FULL, Side
from serve.page.link import MAX_FRAMES
from serve.page.media import NotMedia, read_upload
from serve.page.reply import ServerProblem
from serve.page.request import Question


class Endpoints:
    """What programs can ask of the page.

    Args:
        turn: Held while a comparison is answered.
    """

    def __init__(self, client: Client, choices: Sequence[ReducerChoice], turn: asyncio.Lock) -> None:
        self._client, self._choices, self._turn = client, tuple(choices), turn

    async def compare(
        self,
        media: str | None,
        question: str,
        methods: list[str],
        keep_ratio: float = 0.25,
        num_frames: float = 8,
        max_tokens: float = 64,
    ) -> list[dict[str, Any]]:
        """Ask a question with every token and with each method, one after the other, all cold.

        Args:
            methods: Names, for which `keep_ratio` holds, or whole specifications.

        Raises:
            gr.Error: Something is missing, or there is no server.
        """
        try:
            if media is None or not question.strip():
                raise NotMedia("Give a picture or a clip, and a question.")
            if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
                raise NotMedia(f"methods was {methods!r}; it has to be a list of names or specifications.")
            upload = await asyncio.to_thread(read_upload, media)
            model = (await asyncio.to_thread(self._client.offer)).model
        except (NotMedia, ServerProblem) as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        with_budget = {choice.name for choice in self._choices if choice.has_keep_ratio}
        sides = [FULL, *(Side(reducer=m, keep_ratio=keep_ratio if m in with_budget else None) for m in methods)]
        asked = Question(text=question.strip(), upload=upload, num_frames=int(num_frames), max_tokens=int(max_tokens))
        questions = [_of_side(asked, side) for side in sides]
        start = [Shown(side=side) for side in sides]
        async with self._turn:
            steps = [step async for step in ask_all(self._client, model, questions, start, asyncio.Event())]
        return [_row(one) for one in steps[-1]]

    def methods(self) -> list[dict[str, Any]]:
        """The methods of the page: name, stage, media, what each does and its options."""
        return [
            {
                "name": choice.name,
                "stage": choice.stage,
                "kinds": list(choice.kinds),
                "summary": choice.summary,
                "options": {name: list(v) if isinstance(v, tuple) else v for name, v in choice.options.items()},
            }
            for choice in self._choices
        ]


def _of_side(question: Question, side: Side) -> Question:
    return replace(question, reducer=side.reducer, keep_ratio=side.keep_ratio)


def _row(shown: Shown) -> dict[str, Any]:
    row: dict[str, Any] = {"reducer": shown.side.reducer, "keep_ratio": shown.side.keep_ratio}
    if isinstance(shown.result, ServerProblem):
        return row | {"error": str(shown.result)}
    reply = shown.reply
    assert reply is not None, "an answer that was not stopped is whole or a problem"
    return row | {
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "visual_tokens_in": reply.num_visual_tokens_in,
        "visual_tokens_kept": reply.num_visual_tokens_kept,
        "kv_bytes": reply.kv_bytes,
        "timings_s": dict(reply.timings_s),
        "total_s": total_s(reply),
    }


def add_endpoints(endpoints: Endpoints) -> None:
    """Add the endpoints to the page that is being built. Their components are on no screen."""
    with gr.Group(visible=False):
        media = gr.File(type="filepath", label="Picture or clip")
        question = gr.Textbox(label="Question")
        methods = gr.JSON([], label="Methods: names or specifications")
        keep_ratio = gr.Number(0.25, label="Share of visual tokens to keep", minimum=0.01, maximum=1)
        num_frames = gr.Number(8, label="Frames of a clip", precision=0, minimum=1, maximum=MAX_FRAMES)
        max_tokens = gr.Number(64, label="Answer tokens at most", precision=0, minimum=1, maximum=512)
        rows = gr.JSON(label="One row per side")
        listing = gr.JSON(label="Methods")
        asked, listed = gr.Button(), gr.Button()
    inputs: list[Any] = [media, question, methods, keep_ratio, num_frames, max_tokens]
    asked.click(endpoints.compare, inputs, rows, api_name="compare")
    listed.click(endpoints.methods, None, listing, api_name="methods")

"""All sides of a comparison, asked one after the other: side by side they would slow each other down.

Each is asked with a salt of its own: a question that is asked twice would find its own prompt in the cache, and look
faster than it is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from serve.page.cards import Shown, Stopped
from serve.page.client import Client
from serve.page.reply import Partial, Reply, ServerProblem
from serve.page.request import Question
from serve.page.snippets import snippets

REFRESH_S = 0.08
"""A growing answer is shown at most this often."""


async def ask_all(
    client: Client, model: str, questions: Sequence[Question], start: Sequence[Shown], stop: asyncio.Event
) -> AsyncGenerator[list[Shown]]:
    """What the cards show, again and again; the last time with whatever came.

    Args:
        questions: One per side.
        start: What the cards show before anything is asked.
        stop: Ends the answer that is being written, and asks no further side.
    """
    all_shown = list(start)
    loop = asyncio.get_running_loop()
    for i, question in enumerate(questions):
        salted = replace(question, salt=uuid.uuid4().hex)
        if stop.is_set():
            all_shown[i] = replace(all_shown[i], result=Stopped())
            continue
        all_shown[i] = replace(all_shown[i], is_busy=True)
        yield list(all_shown)
        last_s = loop.time()
        async with aclosing(_answer(client, model, salted, stop)) as results:
            async for result in results:
                all_shown[i] = replace(all_shown[i], result=result)
                if isinstance(result, Partial) and loop.time() - last_s >= REFRESH_S:
                    last_s = loop.time()
                    yield list(all_shown)
        code = snippets(client.url, salted, model, needs_key=client.has_key)
        is_answered = isinstance(all_shown[i].result, Reply)
        all_shown[i] = replace(all_shown[i], is_busy=False, snippets=code if is_answered else {})
    yield all_shown


async def _answer(
    client: Client, model: str, question: Question, stop: asyncio.Event
) -> AsyncGenerator[Partial | Reply | ServerProblem | Stopped]:
    """One answer as it grows, until it is whole or stopped. Its connection is closed with it."""
    answer = client.stream(question, model)
    stopped = asyncio.ensure_future(stop.wait())
    step: asyncio.Future[Partial | Reply | None] | None = None
    is_empty = True
    try:
        while True:
            step = asyncio.ensure_future(anext(answer, None))
            await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                if is_empty:
                    yield Stopped()
                return
            result = step.result()
            if result is None:
                return
            is_empty = False
            yield result
    except ServerProblem as problem:
        yield problem
    finally:
        stopped.cancel()
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait({step})
        await answer.aclose()

"""A question as code to copy: for a POSIX shell, Python and JavaScript.

Each reads the files from the current folder and sends the very request that was answered, except that its answer comes
in one piece. A key stays out of it: the code takes it from the variable MM_API_KEY.
"""

from __future__ import annotations

import json
import pprint
import shlex
import uuid
from collections.abc import Callable
from typing import Any

from serve.client import STANDARD_FIELDS
from serve.page.request import Question, Upload


def snippets(url: str, question: Question, model: str, *, needs_key: bool = False) -> dict[str, str]:
    """Language to code.

    Args:
        url: The server's address, without `/v1`.
        needs_key: Whether the server asks for one.
    """
    return {
        "curl": curl(url, question, model, needs_key=needs_key),
        "Python": python(url, question, model, needs_key=needs_key),
        "JavaScript": javascript(url, question, model, needs_key=needs_key),
    }


def curl(url: str, question: Question, model: str, *, needs_key: bool = False) -> str:
    """A command for a POSIX shell."""

    def written(body: dict[str, Any]) -> str:
        text = json.dumps(body, indent=2, ensure_ascii=False)
        # Inside an unquoted here-document the shell reads \ ` and $; only the files' variables are meant.
        for special in "\\`$":
            text = text.replace(special, f"\\{special}")
        return text

    reads = "".join(
        f"MEDIA{i}=$(base64 < {shlex.quote(upload.name)} | tr -d '\\n')\n" for i, upload in enumerate(question.uploads)
    )
    text = _with_media(question, model, written, lambda i, upload: f"data:{upload.mime};base64,$MEDIA{i}")
    key = ' -H "Authorization: Bearer $MM_API_KEY"' if needs_key else ""
    return (
        f"{reads}curl -sS {shlex.quote(url + '/v1/chat/completions')} -H 'Content-Type: application/json'{key} "
        f"--data-binary @- <<JSON\n{text}\nJSON\n"
    )


def python(url: str, question: Question, model: str, *, needs_key: bool = False) -> str:
    """A script for the `openai` package."""

    def written(body: dict[str, Any]) -> str:
        standard = {name: value for name, value in body.items() if name in STANDARD_FIELDS}
        extra = {name: value for name, value in body.items() if name not in STANDARD_FIELDS}
        return "".join(f"    {name}={_literal(value)},\n" for name, value in (standard | {"extra_body": extra}).items())

    quoted: Callable[[int, Upload], str] = lambda i, upload: f"data_url({upload.name!r}, {upload.mime!r})"  # noqa: E731
    fields = _with_media(question, model, written, quoted, quotes="'")
    imports, key = (
        ("import base64\nimport os", 'os.environ["MM_API_KEY"]') if needs_key else ("import base64", '"none"')
    )
    return (
        f"{imports}\nfrom pathlib import Path\n\nfrom openai import OpenAI\n\n\n"
        "def data_url(name, mime):\n"
        '    return f"data:{mime};base64,{base64.b64encode(Path(name).read_bytes()).decode()}"\n\n\n'
        f"client = OpenAI(base_url={url + '/v1'!r}, api_key={key})\n"
        f"answer = client.chat.completions.create(\n{fields})\n"
        "print(answer.choices[0].message.content)\n"
    )


def javascript(url: str, question: Question, model: str, *, needs_key: bool = False) -> str:
    """A module for Node.js 18 or newer."""
    text = _with_media(
        question,
        model,
        lambda body: json.dumps(body, indent=2),
        lambda i, upload: f"dataUrl({json.dumps(upload.name)}, {json.dumps(upload.mime)})",
        quotes='"',
    )
    key = ",\n    Authorization: `Bearer ${process.env.MM_API_KEY}`" if needs_key else ""
    return (
        'import { readFileSync } from "node:fs";\n\n'
        'const dataUrl = (name, mime) => `data:${mime};base64,${readFileSync(name).toString("base64")}`;\n'
        f"const body = {text};\n"
        f"const response = await fetch({json.dumps(url + '/v1/chat/completions')}, {{\n"
        f'  method: "POST",\n  headers: {{\n    "Content-Type": "application/json"{key}\n  }},\n'
        "  body: JSON.stringify(body),\n});\n"
        "if (!response.ok) throw new Error(await response.text());\n"
        "console.log((await response.json()).choices[0].message.content);\n"
    )


def _literal(value: Any) -> str:
    """A Python literal, its later lines indented as those of an argument."""
    return pprint.pformat(value, width=100, sort_dicts=False).replace("\n", "\n    ")


def _with_media(
    question: Question,
    model: str,
    written: Callable[[dict[str, Any]], str],
    media: Callable[[int, Upload], str],
    quotes: str = "",
) -> str:
    """What `written` makes of the body, with what `media` makes of each file in the place of its data URL.

    Args:
        quotes: Taken off around a file: what stands for it is an expression and no text.
    """
    marks = tuple(f"m{uuid.uuid4().hex}" for _ in question.uploads)
    text = written(question.body(model, marks))
    for i, (mark, upload) in enumerate(zip(marks, question.uploads, strict=True)):
        text = text.replace(f"{quotes}{mark}{quotes}", media(i, upload))
    return text

"""Fragments of HTML around the answers. Pure functions; every text from outside is escaped."""

from __future__ import annotations

from html import escape


def heading(server: str = "") -> str:
    """The page's first lines; `server` is one of those below."""
    return (
        '<header class="mm-head"><h1>mm</h1>'
        f"<p>One question about a picture or a clip: with every visual token, and with fewer.</p>{server}</header>"
    )


def server_line(model: str, url: str, limits: str = "") -> str:
    """The model and its server, with what the model cannot do."""
    note = f'<p class="mm-limits">{escape(limits)}</p>' if limits else ""
    return f'<div class="mm-server">{escape(model)} at <code>{escape(url)}</code></div>{note}'


def server_down(message: str) -> str:
    return f'<div class="mm-server mm-down" role="alert">{escape(message)}</div>'


def status(text: str) -> str:
    """What is going on, for the eye and for screen readers."""
    return f'<p class="mm-status" role="status">{escape(text)}</p>'


def problems(texts: list[str]) -> str:
    """What is wrong with the link that opened the page."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<div class="mm-error" role="alert">This link cannot be followed in full:<ul>{items}</ul></div>'

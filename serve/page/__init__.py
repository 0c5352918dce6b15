"""The demo page: one question, asked with all visual tokens and with fewer, side by side.

The page is a client of the public HTTP API and of nothing else; it does not know whether the server is in this process.
It loads nothing from outside: see `launch.py` for what enforces that.

    launch.py    start what is needed and serve the page
    page.py      which components there are, and which handler each calls
    components.py  the inputs and outputs; form.py their values
    handlers.py  what happens when something is used
    client.py    requests, replies and curl commands of the HTTP API
    media.py     what the page shows of an upload; samples.py offers ready ones
    overlay.py   a kept map as shapes over a picture
    views.py     fragments of HTML; theme.py how they look
"""

from serve.page.launch import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]

"""The demo page: one question, asked with all visual tokens and by any number of methods with fewer, side by side.

The page is a client of the public HTTP API and of nothing else; it does not know whether the server is in this process.
It loads nothing from outside: see `launch.py` for what enforces that.

    launch.py      start what is needed and serve the page
    page.py        which components there are, and which handler each calls
    components.py  the inputs and outputs; form.py their values; choices.py, methods.py what there is to choose
    handlers.py    what happens when something is used; asking.py all sides, one after the other
    client.py      the HTTP API; request.py and reply.py what goes and comes; snippets.py requests as code
    media.py       what the page shows of an upload; samples.py offers ready ones
    overlay.py     a kept map as shapes over a picture
    cards.py       one card per side, as HTML; pictures.py, words.py, figures.py parts of it; views.py what is around
    theme.py       how all that looks
"""

from serve.page.launch import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]

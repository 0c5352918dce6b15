"""`mm eval`: a held-out set of pictures and clips, asked through any model or server, counted and bounded.

    items.py      the Parquet file: what an item is, reading and checking, choosing some
    scoring.py    when an answer is right
    intervals.py  shares with bootstrap intervals
    local.py      answers from a model in this process
    remote.py     answers from an OpenAI-compatible server
    run.py        the evaluation, from items to a result
    report.py     progress and the table

Knows nothing of how the set was drawn (`demos/train/data/held_out.py` writes it) and no file of the engine.
"""

"""Search for a schedule of visual tokens: how many each decoder layer should see.

schedule.py  a schedule, what it costs, and its specification as a reducer
greedy.py    the fewest tokens per layer that do not hurt
sigmoid.py   the best sigmoid under a budget of FLOPs
trials.py    what a schedule scores, remembered on disk
command.py   `mm tune`
"""

"""The simulated decoder takes the steps that the server's own scheduler takes."""

from __future__ import annotations

import random

import pytest

from serve.planning.decoder import Decoder, Outputs, Sequence, _steps_in, _sum
from serve.planning.events import Device, Loop
from tests.helpers.planning import curves
from tests.mm.engine.test_scheduler import Line

Step = tuple[int, tuple[int, ...]]
"""Sequences that decode, and the lengths of the chunks."""


def real_steps(requests: list[tuple[int, int, int]], most: int, budget: int) -> list[Step]:
    """Steps of `mm.engine.scheduler`; requests are (step of arrival, prompt, output)."""
    line = Line(num_rows=100_000, max_num_seqs=most, max_num_batched_tokens=budget)
    line.scheduler._prefix_cache.enabled = False
    steps, pending = list[Step](), list(requests)
    while pending or line.scheduler.running or line.scheduler.waiting:
        for at, prompt, output in [one for one in pending if one[0] <= len(steps)]:
            line.arrive(prompt, output)
            pending.remove((at, prompt, output))
        plan = line.step()
        steps.append((len(plan.decode), tuple(chunk.num_tokens for chunk in plan.chunks)))
    return steps


def simulated_steps(requests: list[tuple[int, int, int]], most: int, budget: int) -> list[Step]:
    """Of the simulated decoder, with steps of one second, so that requests arrive in the same steps."""
    one_second = {
        "prefill": {"tokens": [1], "cached": [0], "seconds": [[1.0]]},
        "decode": {"batch": [1], "context": [0], "seconds": [[1.0]]},
        "step_s": 1.0,
        "engine": {"max_num_seqs": most, "max_batch_tokens": budget},
    }
    loop, steps = Loop(), list[Step]()
    decoder = Decoder(Device(loop), curves(**one_second), Outputs(lambda _: None, lambda _: None))
    runs = list[tuple[float, int, tuple[int, ...]]]()
    decoder.on_step = lambda num, chunks: runs.append((loop.now, num, tuple(tokens for _, tokens in chunks)))
    for index, (at, prompt, output) in enumerate(requests):
        # Just after a step has begun; the real one looks at what has arrived when the next one begins.
        loop.at(max(0.0, at - 0.5), decoder.put, Sequence(index, prompt, output))
    loop.run()
    for (start, num, chunks), (end, _, _) in zip(runs, [*runs[1:], (loop.now, 0, ())], strict=True):
        steps += [(num, chunks)] * round(end - start)
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_steps_are_those_of_the_scheduler(seed):
    rng = random.Random(seed)
    most, budget = rng.choice([2, 4, 8]), rng.choice([8, 16, 64])
    requests = sorted((rng.randrange(1, 40), rng.randint(1, 60), rng.randint(1, 20)) for _ in range(25))
    requests.insert(0, (0, 5, 300))  # one that lasts, since the real one would count steps in which it is idle
    assert simulated_steps(requests, most, budget) == real_steps(requests, most, budget)


@pytest.mark.parametrize(("first", "slope"), [(0.02, 0.0), (0.02, 1e-5), (0.02, 0.003)])
def test_the_present_step_is_found_in_a_run_of_steps(first, slope):
    for steps in (1, 2, 17):
        assert _steps_in(_sum(steps, first, slope) - 1e-4, first, slope) == steps
        assert _steps_in(_sum(steps, first, slope) + 1e-4, first, slope) == steps + 1

"""Does choosing tokens cost less than it saves?

    python -m demos.bench.reducer_speed [--out FILE]

There are 2,880 visual tokens, and a quarter is kept. Selection is measured at width 4,096, that of a 7B decoder.
Prefill of the same number of tokens is measured with a decoder of 256M's shape (30 layers of 576) and random weights.
A 7B decoder's prefill costs about 50 times as much, so the share that selection takes here is an upper bound of the
share there. Methods in front of the decoder leave the same number of tokens, whose prefill is measured once. Those
inside the decoder decide during prefill, and each is measured by itself. The ideal is the share of FLOPs: of
projections and MLP per token, of attention per pair of tokens. Seconds are CPU time of this process with one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mm
from demos.bench.budgets import NO_METHOD, spec_of
from demos.bench.machine import facts
from demos.bench.reducer_bench import Timed
from demos.bench.shapes import SHAPES, write_shape
from mm.api import build_request
from mm.config import ModelConfig
from mm.data.outputs import Delta
from mm.data.tokens import Encoded, EncodedMedia, VisualTokens
from mm.engine.loop import OutputQueue
from mm.media import MediaBudget, image_from_array
from mm.plugins.apply import apply
from mm.plugins.capabilities import in_prefill
from mm.plugins.features import ATTENTION_RECEIVED, CLS_ATTENTION, TOWER_FEATURES, TOWER_KEYS
from mm.plugins.reducer import ReduceContext, Stage
from mm.plugins.registry import get, names
from mm.plugins.spec import build_reducer
from serve.evaluation.report import markdown

NUM_TOKENS, WIDTH, KEEP_RATIO, NUM_TEXT = 2880, 4096, 0.25, 20
GRIDS = {"image": (5, 24, 24), "video": (20, 12, 12)}
SHAPE = "256m"
INSIDE = {"fastv": "fastv:keep_ratio=0.25,layer=2", "pyramiddrop": "pyramiddrop:keep_ratio=0.25"}
THRESHOLD = 0.0014
"""Of MustDrop on the shipped model: leaves about a quarter of a picture's tokens."""


def cpu_s(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def methods() -> list[str]:
    """All but those that act inside the tower, whose cost and saving are in the tower's own time."""
    found = [name for name in names("reducer") if name not in NO_METHOD]
    return [name for name in found if Stage.IN_VIT not in get("reducer", name).acts_at]


# ── selection against prefill ─────────────────────────────────────────────────────────────────────────────────────────


def tokens_of(width: int, kind: str) -> VisualTokens:
    """Random tokens with all auxiliary features. Neighbours resemble each other, as they do in pictures."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    steps = random(NUM_TOKENS, width)
    embeddings = steps + 0.7 * steps.roll(1, 0)
    attention = random(16, NUM_TOKENS).softmax(-1)
    aux_features = {
        CLS_ATTENTION: attention,
        ATTENTION_RECEIVED: attention,
        TOWER_KEYS: random(64, NUM_TOKENS),
        TOWER_FEATURES: random(1024, NUM_TOKENS),
    }
    return VisualTokens.full(embeddings, GRIDS[kind], kind, aux_features)  # type: ignore[arg-type]


def selection_s(method: str, repeats: int) -> float:
    """The fastest of some runs of a method in front of the decoder at width 4,096, after one that warms up."""
    kinds = getattr(get("reducer", method), "kinds", ("image", "video"))
    tokens = tokens_of(WIDTH, "image" if "image" in kinds else "video")
    reducer = build_reducer(spec_of(method, KEEP_RATIO, THRESHOLD))
    context = ReduceContext(aux_features=tokens.aux_features, text_embeddings=torch.randn(NUM_TEXT, WIDTH))

    def run() -> None:
        apply(reducer.after_encode(tokens, context), tokens, method)

    run()
    return min(cpu_s(run) for _ in range(repeats))


def prefill(model: mm.Model, tokens: VisualTokens, spec: str) -> tuple[float, float, int]:
    """CPU seconds to the first token, those of the method in the decoder, and tokens of all layers."""
    reducer, feed = Timed(build_reducer(spec)), OutputQueue()
    request = build_request("What is in the picture?", images=[blank(model)], max_new_tokens=2, temperature=0.0)
    start = time.process_time()
    media = EncodedMedia(items=(Encoded(tokens=tokens.without_aux_features()),), reducer=spec)
    job = model.engine.submit(request, media, feed, reducer)
    while not any(isinstance(event, Delta) for event in feed.take()):
        model.engine.step()
    seconds = time.process_time() - start
    rows = int(model.engine.cache.lengths.sum())
    model.engine.abort(job)
    return seconds, reducer.select_s, rows


def blank(model: mm.Model) -> Any:
    return image_from_array(np.zeros((32, 32, 3), np.uint8), MediaBudget(model.config.limits))


def flops(rows: Sequence[int]) -> float:
    """FLOPs of a prefill with so many tokens in each layer."""
    shape = SHAPES[SHAPE]
    head = shape.width // shape.num_heads
    linear = 2 * shape.width * (2 * shape.width + 2 * shape.num_kv_heads * head + 3 * shape.ffn)
    return sum(n * linear + 2 * n * n * shape.width for n in rows)


def bench_select(repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(Path(folder), SHAPE, torch.float32)
        config = ModelConfig(
            model=str(path), dtype="float32", num_threads=1, cache_bytes=0, prefix_caching=False, kv_cache_gb=0.25
        )
        model = mm.Model(config)
        tokens = tokens_of(SHAPES[SHAPE].width, "image")
        prefill(model, small(tokens), "none")  # warms up
        full_s, _, full_rows = prefill(model, tokens, "none")
        kept = apply(build_reducer("uniform:keep_ratio=0.25").after_encode(tokens, ReduceContext()), tokens, "uniform")
        kept_s, _, kept_rows = prefill(model, kept, "none")
        num_layers = SHAPES[SHAPE].num_layers
        ideal = flops([kept_rows // num_layers] * num_layers) / flops([full_rows // num_layers] * num_layers)
        rows = []
        for method in methods():
            reducer = build_reducer(spec_of(method, KEEP_RATIO, THRESHOLD))
            if not in_prefill(reducer):
                chosen = selection_s(method, repeats)
                rows.append(row(method, chosen, kept_s + chosen, full_s, 1 - ideal))
            elif method in INSIDE:
                total, chosen, _ = prefill(model, tokens, INSIDE[method])
                rows.append(row(method, chosen, total, full_s, None))
            else:
                print(f"{method}: left out, its budget is spelled in thresholds", flush=True)
                continue
            print(rows[-1], flush=True)
    return {"full_s": round(full_s, 2), "kept_s": round(kept_s, 2), "ideal_saving": round(1 - ideal, 4), "rows": rows}


def small(tokens: VisualTokens) -> VisualTokens:
    keep = build_reducer("uniform:keep_ratio=0.01").after_encode(tokens, ReduceContext())
    return apply(keep, tokens, "uniform")


def row(method: str, chosen_s: float, total_s: float, full_s: float, ideal_saving: float | None) -> dict[str, Any]:
    """Shares of the prefill without reduction."""
    saved = full_s - (total_s - chosen_s)
    return {
        "method": method,
        "select_s": round(chosen_s, 4),
        "select_of_saved": round(chosen_s / saved, 4),
        "total_over_none": round(total_s / full_s, 4),
        "saving_of_ideal": None if ideal_saving is None else round((1 - total_s / full_s) / ideal_saving, 4),
    }


def report_select(result: dict[str, Any]) -> str:
    lines = [
        [
            line["method"],
            f"{1e3 * line['select_s']:.0f}",
            f"{line['select_of_saved']:.1%}",
            f"{line['total_over_none']:.2f}",
            "-" if line["saving_of_ideal"] is None else f"{line['saving_of_ideal']:.0%}",
        ]
        for line in result["rows"]
    ]
    head = (
        f"{NUM_TOKENS} visual tokens, {KEEP_RATIO:.0%} kept; prefill {result['full_s']} s with all, "
        f"{result['kept_s']} s with a quarter; FLOPs saved at most {result['ideal_saving']:.1%}"
    )
    header = [
        "method",
        "select ms (width 4,096)",
        "of the prefill saved",
        "select + prefill, none = 1",
        "of the ideal saving",
    ]
    return f"{head}\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = bench_select(args.repeats)
    text = f"{report_select(result)}\n\n{json.dumps({'question': 'reducer-select', 'machine': facts(), **result})}"
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

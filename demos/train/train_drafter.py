"""Train drafters for a frozen model, from its own answers to the generator's questions about pictures and clips.

Nothing is stored. The target answers, and the drafters learn from its hidden states and output distributions on these
answers (online distillation). The last few hundred answers are used again and again while new ones come in. Several
vision adapters may be trained in one run: they share the target's work, and their curves can be compared step by step.

    python -m demos.train.train_drafter --target tiny --seeing none,msd --out RUN/drafters --steps 1500 [--resume]

Each drafter is a folder (config.json, model.safetensors, training.jsonl) that `eagle:weights=FOLDER` names. In the
target's own folder, under drafters/, it is found by its name. `--resume` continues from RUN/drafters/state.pt
(state-eagle3.pt).
"""

import argparse
import dataclasses
import json
import random
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mm
from demos.train.data.things import HELD_OUT
from demos.train.draft_data import Target, stream
from demos.train.drafting import (
    FEATURE_WEIGHT,
    STATIC_TREE,
    Sample,
    accepted_length,
    losses,
    pack,
    ranks,
    unroll,
)
from demos.train.training import Optimisers, append_record, save_checkpoint
from mm.device import has_bfloat16
from mm.engine.spec_decode.drafters.eagle.head import DraftConfig, DraftHead, default_feature_layers, fingerprint

WAYS = ("none", "msd", "vispec", "specvlm", "flash")
BATCH = 16  # answers per step
POOL = 640  # answers that are used again and again
PICTURES = 16  # asked about at a time, PER_PICTURE questions each
PER_REFILL = 20  # steps between two batches of new answers
UNROLL = 3  # steps in which a drafter reads its own outputs in training
AHEAD = 8  # tokens per forward of FLASH
MUON_LR, ADAM_LR = 0.01, 6e-4
FEATURE_SHARE = 0.33  # of the steps, in which the distance to the target's states counts
BLIND_SHARE = 0.4  # of the steps in which MSD reads text only, the first of its two stages; pictures follow
CHAIN = 7  # of the simulated chain
HELD_OUT_BATCHES = 6
FIRST_SEED = 0  # of the training's pictures; held-out ones begin at HELD_OUT


@dataclasses.dataclass
class Learner:
    """One drafter under training."""

    name: str
    network: DraftHead
    optimisers: Optimisers


def draft_config(args: argparse.Namespace, target: Target, seeing: str) -> DraftConfig:
    text = target.language.config
    return DraftConfig(
        width=text.hidden_size,
        vocab_size=target.language.vocab_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=target.language.head_dim,
        intermediate_size=args.intermediate or text.intermediate_size,
        norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters.get("rope_theta", 10000.0),
        vision_adapter=seeing,
        vision_adapter_options=json.loads(args.seeing_options) if args.seeing_options else {},
        feature_layers=target.taps,
        num_ahead=AHEAD if seeing == "flash" else 1,
        draft_vocab_size=args.draft_vocab,
        target=fingerprint(target.head),
    )


def optimisers_of(network: DraftHead, args: argparse.Namespace) -> Optimisers:
    """Muon for the matrices of the layer and what feeds it, AdamW for the rest."""
    seeing = {id(p) for p in network.vision_adapter.parameters()} | {id(network.own_head)}
    matrices = [p for p in network.parameters() if p.ndim == 2 and id(p) not in seeing]
    inside = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in inside]
    return Optimisers(
        matrices, others, muon_lr=args.lr, adam_lr=ADAM_LR, num_steps=args.steps, warmup_steps=30, decay_from=0.4
    )


def shown(sample: Sample, name: str, done: float, rng: random.Random) -> Sample:
    """The sample as a vision adapter gets it at this point of the training: MSD learns on text first."""
    if name != "msd" or done >= 1 or rng.random() < (done - BLIND_SHARE) / (1 - BLIND_SHARE) * 2:
        return sample
    none = torch.zeros(0, dtype=torch.int64)
    context = sample.context
    hidden = dataclasses.replace(
        context, embeddings=context.embeddings[none], positions=none, items=none, features=context.question[:0]
    )
    return dataclasses.replace(sample, context=hidden)


def learn(learner: Learner, samples: list[Sample], head: Tensor, step: int, args: argparse.Namespace) -> dict[str, Any]:
    """One step. Loss, and the agreement with the target's token by depth."""
    network, done = learner.network.train(), step / args.steps
    rng = random.Random(step)
    weight = FEATURE_WEIGHT if done < FEATURE_SHARE else 0.0
    with torch.autocast(head.device.type, torch.bfloat16, enabled=has_bfloat16(args.device)):
        packed = pack(network, [shown(sample, learner.name, done, rng) for sample in samples])
        guesses = unroll(network, packed, args.unroll)
        loss, agreed = losses(network, guesses, packed, head, weight)
    loss.backward()
    for parameter in network.parameters():
        if parameter.grad is None:  # a branch that no sample took
            parameter.grad = torch.zeros_like(parameter)
    learner.optimisers.step(step)
    return {"loss": round(loss.item(), 4), "agreed": [round(a, 3) for a in agreed]}


@torch.no_grad()
def evaluate(network: DraftHead, batches: list[list[Sample]]) -> dict[str, dict[str, float]]:
    """Simulated accepted length (bonus included) per task on greedy answers: a chain, and EAGLE-1's tree.

    Teacher-forced: along an accepted path a drafter has read the answer's own tokens, so no target is run.
    """
    network.eval()
    num_steps = max(CHAIN, network.config.num_ahead)
    counts: Counter[tuple[str, str, str]] = Counter()
    for samples in batches:
        packed = pack(network, samples)
        found = ranks(network, unroll(network, packed, num_steps), packed)
        for i, sample in enumerate(samples):
            for shape, tree in (("chain 3", 3), (f"chain {CHAIN}", CHAIN), ("tree 25", STATIC_TREE)):
                tokens, rounds = accepted_length(found[i : i + 1], [len(sample.answer_states)], tree)
                for task in (sample.task, "all"):
                    counts[task, shape, "tokens"] += tokens
                    counts[task, shape, "rounds"] += rounds
    result: dict[str, dict[str, float]] = {}
    for task, shape, what in sorted(counts):
        if what == "rounds":
            result.setdefault(task, {})[shape] = round(counts[task, shape, "tokens"] / counts[task, shape, what], 2)
    return result


def frequent_tokens(pool: deque[Sample], size: int) -> Tensor:
    """(size,) ids: those that answers hold most often, and others to fill up."""
    counts = Counter(t for sample in pool for t in sample.answer_ids.tolist())
    ids = [token for token, _ in counts.most_common(size)]
    return torch.tensor(ids + [t for t in range(size + len(ids)) if t not in counts][: size - len(ids)])


def held_out(target: Target, args: argparse.Namespace) -> list[list[Sample]]:
    """Greedy answers about pictures that no training sees, unreduced."""
    batches = stream(target, HELD_OUT + 700_000, batch=args.pictures, sampled_share=0.0)
    return [next(batches) for _ in range(args.held_out_batches)]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="tiny", help="what mm.load takes: a shipped model, a folder or a hub name")
    parser.add_argument("--seeing", default="none", help=f"vision adapters, comma-separated: {', '.join(WAYS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--stop-at", type=int, help="stop early, with the schedule of --steps")
    parser.add_argument("--eagle3", action="store_true", help="read three layers of the target instead of the last")
    parser.add_argument("--unroll", type=int, default=UNROLL, help="steps in which the drafter reads its own outputs")
    parser.add_argument(
        "--draft-vocab", type=int, help="draft only so many of the most frequent tokens, by an own head"
    )
    parser.add_argument("--intermediate", type=int, help="width of the MLP; the target's by default")
    parser.add_argument("--seeing-options", help='JSON, such as {"num_rows": 8}')
    parser.add_argument("--suffix", default="", help="appended to the names of the folders")
    parser.add_argument("--reducers", default="none", help="specifications, separated by ;, drawn from batch by batch")
    parser.add_argument("--lr", type=float, default=MUON_LR)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="pictures that are asked about at a time")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--held-out-batches", type=int, default=HELD_OUT_BATCHES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the target, as for mm.load")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    run(args)


def run(args: argparse.Namespace) -> None:
    model = mm.load(args.target, device=args.device, dtype=args.dtype)
    num_layers = model.engine.family.language.num_layers
    target = Target(model, default_feature_layers(num_layers) if args.eagle3 else ())
    head, learners = target.head.float(), []
    for name in args.seeing.split(","):
        network = DraftHead(draft_config(args, target, name), target.embedding, head).to(args.device)
        learners.append(Learner(name, network, optimisers_of(network, args)))
    first = resume(args, learners) if args.resume else 0
    reducers = tuple(args.reducers.split(";"))
    answers = stream(target, FIRST_SEED + first * args.pictures, batch=args.pictures, reducers=reducers)
    pool: deque[Sample] = deque(maxlen=args.pool)
    while len(pool) < min(args.pool, 3 * args.batch):
        pool.extend(next(answers))
    if args.draft_vocab and not first:
        for learner in learners:
            learner.network.take_vocabulary(frequent_tokens(pool, args.draft_vocab))
    checks = held_out(target, args)
    rng, start = random.Random(first), time.process_time()
    for step in (bar := tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)):
        if (step - first) % PER_REFILL == 0:
            pool.extend(next(answers))
        samples = rng.sample(list(pool), args.batch)
        records = {learner.name: learn(learner, samples, head, step, args) for learner in learners}
        last = step + 1 == (args.stop_at or args.steps)
        if step % 20 == 0:
            for learner in learners:
                record(args, learner, step=step, cpu_s=round(time.process_time() - start, 1), **records[learner.name])
            bar.set_postfix_str(" ".join(f"{n} {r['agreed'][0]:.2f}" for n, r in records.items()), refresh=False)
        if (step + 1) % args.eval_every == 0 or last:
            for learner in learners:
                lengths = evaluate(learner.network, checks)
                record(args, learner, step=step + 1, cpu_s=round(time.process_time() - start, 1), accepted=lengths)
                tqdm.write(
                    f"step {step + 1} {learner.name} "
                    + json.dumps({k: lengths[k] for k in ("all", "caption") if k in lengths})
                )
                write(args, learner, step + 1, lengths)
            save(args, learners, step + 1)
        if last:
            break


def folder(args: argparse.Namespace, learner: Learner) -> Path:
    """Named as the drafters that look for it: a drafter that reads no visual token is plain EAGLE."""
    if learner.name == "none":
        return args.out / f"eagle{3 if args.eagle3 else ''}{args.suffix}"
    return args.out / f"{learner.name}{'-eagle3' if args.eagle3 else ''}{args.suffix}"


def record(args: argparse.Namespace, learner: Learner, **values: object) -> None:
    append_record(folder(args, learner) / "training.jsonl", **values)


def write(args: argparse.Namespace, learner: Learner, step: int, lengths: dict[str, dict[str, float]]) -> None:
    """The drafter's folder as it would ship."""
    network = learner.network
    trained = {"steps": step, "batch": args.batch, "unroll": args.unroll, "accepted_length": lengths}
    network.config = dataclasses.replace(network.config, trained=trained)
    network.save(folder(args, learner))


def save(args: argparse.Namespace, learners: list[Learner], step: int) -> None:
    state = {
        learner.name: {"network": learner.network.state_dict(), "optimisers": learner.optimisers.state_dict()}
        for learner in learners
    }
    save_checkpoint(state_file(args), step=step, learners=state)


def state_file(args: argparse.Namespace) -> Path:
    """What --resume reads: one per kind of input, so that both kinds may be trained into one folder."""
    return args.out / f"state{'-eagle3' if args.eagle3 else ''}{args.suffix}.pt"


def resume(args: argparse.Namespace, learners: list[Learner]) -> int:
    """Load the state of an earlier run of the same drafters. Returns the step at which to continue."""
    state = torch.load(state_file(args), map_location=args.device, weights_only=True)
    if missing := [learner.name for learner in learners if learner.name not in state["learners"]]:
        raise SystemExit(f"{args.out} holds {', '.join(state['learners'])} and not {missing[0]}; give its --seeing")
    for learner in learners:
        learner.network.load_state_dict(state["learners"][learner.name]["network"])
        learner.optimisers.load_state_dict(state["learners"][learner.name]["optimisers"])
    return state["step"]


if __name__ == "__main__":
    main()

"""What the trainings of learned reducers have in common: arguments, a checked base, checkpoints, and the loop."""

import argparse
import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from demos.train.frozen import CHECK_SEED, FrozenFeatures, load_base
from demos.train.training import append_record, save_checkpoint
from mm.plugins.weights import DECODER, TENSORS, checkpoint_fingerprint


class Stateful(Protocol):
    """A part of a checkpoint: a module, an optimiser, or whatever else has a state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class ReducerTraining(ABC):
    """One training of a reducer for a frozen or adapted checkpoint.

    Attributes:
        model: The checkpoint, in float32 and frozen.
        features: The tower's features of the pictures and clips to train on.
        parts: What a checkpoint stores, by name; `__init__` of a subclass fills it.
    """

    save_every: ClassVar[int]
    record_every: ClassVar[int] = 10

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model, self.features = load_base(args.base, args.device), FrozenFeatures(args.run)
        if self.features.info["base"] != checkpoint_fingerprint(args.base):
            raise SystemExit(
                f"{args.run} holds features of another checkpoint than {args.base}; run demos.train.frozen anew"
            )
        self.parts: dict[str, Stateful] = {}

    @property
    def out(self) -> Path:
        return self.args.run / self.args.name

    def held_out_features(self) -> FrozenFeatures:
        """Features of the held-out scenes and clips that the arguments ask for."""
        counts = getattr(self.args, "scenes", 0), getattr(self.args, "clips", 0)
        return FrozenFeatures.of_seeds(self.model, *counts, CHECK_SEED + self.args.skip)

    @abstractmethod
    def learn(self, step: int) -> dict[str, Any]:
        """Take one step of the training and return what the curve records of it."""

    @abstractmethod
    def check(self) -> dict[str, Any]:
        """Return a few held-out figures, quickly."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Return every held-out figure."""

    @abstractmethod
    def save(self, step: int, trained: dict[str, Any]) -> None:
        """Write the reducer's folder; `trained` is added to what its config.json says of the training."""

    def load_checkpoint(self) -> tuple[int, float]:
        """(step, seconds) of the checkpoint."""
        state = torch.load(self.out / "state.pt", map_location=self.args.device, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"], state["seconds"]

    def save_checkpoint(self, step: int, seconds: float) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.out / "state.pt", **states, step=step, seconds=seconds)


def load_reducer(folder: Path, network: nn.Module, decoder: nn.Module) -> None:
    """Take a network and decoder layers from a folder that an earlier training wrote.

    Raises:
        RuntimeError: The network has other tensors.
        SystemExit: The decoder has not all layers of the folder.
    """
    tensors = {name: tensor for name, tensor in load_file(folder / TENSORS).items() if name != "digits"}  # of the base
    network.load_state_dict(tensors)
    if (folder / DECODER).is_file():
        changed = {name: tensor.float() for name, tensor in load_file(folder / DECODER).items()}
        unexpected = decoder.load_state_dict(changed, strict=False).unexpected_keys
        if unexpected:
            raise SystemExit(f"{folder / DECODER} has {unexpected[0]}, which the decoder of --base has not")


def build_parser(
    doc: str, *, name: str, steps: int, scenes: int | None = None, clips: int | None = None
) -> argparse.ArgumentParser:
    """The arguments that all have; scenes and clips: how many held-out ones by default, None where it has none."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="exported folder of the finished checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder with its features; results go to RUN/NAME")
    parser.add_argument("--name", default=name)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--stop-at", type=int, help="leave early, the schedule being that of --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    for kind, count in (("scenes", scenes), ("clips", clips)):
        if count is not None:
            parser.add_argument(f"--{kind}", type=int, default=count, help="held-out ones")
    parser.add_argument("--skip", type=int, default=0, help="first held-out seeds to pass over, as known already")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", action="store_true", help="measure RUN/NAME and train nothing")
    return parser


def main(kind: type[ReducerTraining], parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run(kind, args)


def run(kind: type[ReducerTraining], args: argparse.Namespace) -> None:
    """Train, or with --evaluate measure what was trained."""
    training = kind(args)
    first, seconds = training.load_checkpoint() if args.resume or args.evaluate else (0, 0.0)
    if args.evaluate:
        result = training.evaluate()
        counts = {name: getattr(args, name) for name in ("scenes", "clips", "skip") if hasattr(args, name)}
        training.save(first, {"seconds": round(seconds), "held_out": result, "held_out_seeds": counts})
        print(json.dumps(result, indent=1))
        return
    train(training, first, seconds)


def train(training: ReducerTraining, first: int, seconds: float) -> None:
    args = training.args
    end = args.stop_at or args.steps
    if not first < end <= args.steps:
        raise SystemExit(
            f"step {first} is reached and {end} of {args.steps} is the end; give other --steps or --stop-at"
        )
    curve, start = training.out / "training.jsonl", time.time() - seconds
    for step in tqdm(range(first, end), initial=first, total=args.steps, mininterval=10):
        record = training.learn(step)
        if step % training.record_every == 0:
            append_record(curve, step=step, **record)
        if (step + 1) % training.save_every == 0 or step + 1 == end:
            seconds, scores = time.time() - start, training.check()
            append_record(curve, step=step + 1, seconds=round(seconds), held_out=scores)
            tqdm.write(f"step {step + 1} {record} {scores}")
            training.save_checkpoint(step + 1, seconds)
            training.save(step + 1, {"seconds": round(seconds)})

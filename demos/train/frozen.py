"""What the trainings of reducers share: a finished checkpoint, the features of its tower, and its folder of results.

The checkpoint is an exported folder. Its tower sees the generator's pictures once; the features stay on disk. Seeds
begin at FIRST_SEED, so that no picture occurs here that the checkpoint itself was trained on.

    python -m demos.train.frozen --base mm/models/weights/tiny --run RUN --scenes 8000 --clips 2400

Writes scenes.bin, clips.bin and features.json into RUN, as `cache_features.py` does from a run's own tower.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.questions import SHORT_KINDS, Question
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.data.things import HELD_OUT, Scene
from demos.train.lm_data import Batch, Batches, Features
from demos.train.model import IMAGE_TOKENS, normalise
from demos.train.packing import Packer, collate
from demos.train.train_vit import run_tower
from mm.plugins.weights import CARD, DECODER, TENSORS, checkpoint_fingerprint

FIRST_SEED = 100_000  # the shipped model was trained on seeds below
CHECK_SEED = HELD_OUT + 300_000  # of the checks during these trainings; demos.train.evaluate and mm eval use others
BATCH = 16
LONG_SHARE = {"caption": 0.6, "tour": 0.3, "list": 0.2}  # of the rows of scenes


def load_base(folder: Path, device: str) -> LlavaForConditionalGeneration:
    """The checkpoint in float32, frozen."""
    return (
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        .to(device)
        .eval()
        .requires_grad_(False)
    )


# ── features ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pictures(Dataset[np.ndarray]):
    """Item i: uint8 pictures (n, 224, 224, 3); BATCH scenes, or the distinct frames of one clip."""

    def __init__(self, kind: str, count: int, first: int) -> None:
        self.kind, self.count, self.first = kind, max(0, count), first

    def __len__(self) -> int:
        return -(-self.count // BATCH) if self.kind == "scenes" else self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if self.kind == "clips":
            return draw_clip(sample_clip(self.first + index), distinct=True)
        seeds = range(index * BATCH, min(self.count, (index + 1) * BATCH))
        return np.stack([draw_scene(sample_scene(self.first + seed)) for seed in seeds])


def features(tower: torch.nn.Module, pictures: Pictures, device: str, workers: int = 0) -> Iterator[Tensor]:
    """Patch features (n, 256, D), bfloat16, of each item."""
    loader = DataLoader(pictures, batch_size=None, num_workers=workers)
    for pixels in tqdm(loader, desc=pictures.kind, mininterval=10):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            yield run_tower(tower, normalise(np.asarray(pixels)).to(device))[:, 1:].to("cpu", torch.bfloat16)


class FrozenFeatures(Features):
    """Features of seeds FIRST_SEED and on (or of other ones, in memory); an item is a seed less the first one."""

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "features.json").read_text())
        self.scenes = self.open(folder / "scenes.bin")
        self.folder, self.clips = folder, None
        first = self.info["first_seed"]
        self.index_clips(list(range(first, first + self.info["clips"])))

    @classmethod
    def of_seeds(cls, model: LlavaForConditionalGeneration, scenes: int, clips: int, first: int) -> "FrozenFeatures":
        """Computed now and kept in memory: for held-out seeds."""
        made = cls.__new__(cls)
        tower, device = model.model.vision_tower, model.device.type
        parts = {
            kind: [*features(tower, Pictures(kind, n, first), device)]
            for kind, n in (("scenes", scenes), ("clips", clips))
        }
        made.scenes = torch.cat(parts["scenes"]) if scenes else torch.zeros(0)
        made.clips = torch.cat(parts["clips"]) if clips else torch.zeros(0)
        made.info = {"scenes": scenes, "clips": clips, "first_seed": first}
        made.index_clips(list(range(first, first + clips)))
        return made


class FrozenBatches(Batches):
    """Batches of one sort, with all visual tokens in the row; items count from the first seed of the features."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, info: dict, questions: int = 12) -> None:
        super().__init__(tokenizer, info, 0, 1, torch.ones(len(SHORT_KINDS)))
        self.tokenizer = tokenizer
        self.first, self.questions, self.long_share = info["first_seed"], questions, LONG_SHARE

    def kinds(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        kinds = ["read"] * (2 if scene.texts else 0) + ["number"] * (2 if scene.display else 0)
        kinds += ["chart"] * (3 if scene.chart else 0) + ["name"] * (1 if len(scene.things) == 1 else 0)
        kinds += [kind for kind, share in self.long_share.items() if rng.random() < share]
        return kinds + rng.choice(SHORT_KINDS, size=max(0, self.questions - len(kinds))).tolist()

    def draw(
        self, kind: str, items: list[int], rng: np.random.Generator, *, unseen: bool = False, plain: bool = True
    ) -> Batch:
        """A batch about these items of one kind: "scenes" or "clips"."""
        seeds = [self.first + item for item in items]
        batch = getattr(self, kind)(seeds, rng, True, plain, unseen)
        batch.items = [(item,) for item in items]
        return batch


def pack_rows(
    packer: Packer, asked: list[list[Question]], places: list[list[int]], lengths: list[int], *, clip: bool
) -> Batch:
    """Positions of questions that follow visual parts of any size: per token, and their number per row."""
    rows, starts, rng = [], [], np.random.default_rng(0)  # plain rows draw nothing
    for own, at, length in zip(asked, places, lengths, strict=True):
        starts.append(sum(len(row) for row in asked[: len(rows)]))
        rows.append(packer.pack(own, length, np.array(at), rng, plain=True))
        rows[-1].looks = rows[-1].looks[:1]  # nobody asks where to look here, and collate wants one
        rows[-1].looks = [(place, slot, (0,)) for place, slot, _ in rows[-1].looks]
    most = max(len(at) for at in places)
    kept = np.stack([np.pad(at, (0, most - len(at)), constant_values=-1) for at in places])
    packed = collate(rows, kept, max(lengths), starts)
    return Batch(packed, [q for own in asked for q in own], [(0,)] * len(asked), clip)


# ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_reducer(
    folder: Path, tensors: dict[str, Tensor], config: dict, decoder: dict[str, Tensor] | None = None
) -> None:
    """model.safetensors, config.json, and decoder.safetensors (bfloat16) where the decoder was adapted."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    if decoder:
        half = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in decoder.items()}
        save_file(half, folder / DECODER)
    config |= {"torch": torch.__version__, "machine": platform.machine()}
    (folder / CARD).write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="exported folder")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--clips", type=int, default=2400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="add to what RUN holds; give larger counts")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tower = load_base(args.base, args.device).model.vision_tower
    args.run.mkdir(parents=True, exist_ok=True)
    done = {"scenes": 0, "clips": 0}
    if args.resume:
        done = json.loads((args.run / "features.json").read_text())
    info = {
        "scenes": args.scenes,
        "clips": args.clips,
        "first_seed": FIRST_SEED,
        "base": checkpoint_fingerprint(args.base),
    }
    info |= {"tokens": IMAGE_TOKENS, "width": tower.config.hidden_size}
    for kind in ("scenes", "clips"):
        pictures = Pictures(kind, info[kind] - done[kind], FIRST_SEED + done[kind])
        with (args.run / f"{kind}.bin").open("ab" if args.resume else "wb") as file:
            for block in features(tower, pictures, args.device, args.workers):
                file.write(block.view(torch.uint16).numpy().tobytes())
    (args.run / "features.json").write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    main()

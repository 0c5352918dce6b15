"""Between the stages: run the trained tower over the pictures of the first N seeds and store its patch features.

Writes scenes.bin (N, 256, D) and clips.bin (all distinct frames of all clips, 256, D) in bfloat16, and features.json.

    python -m demos.train.cache_features --run RUN --scenes 16000 --clips 1200
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from demos.train.data.clips import draw_clip, sample_clip
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.model import IMAGE_TOKENS, build_config, build_model, normalise
from demos.train.train_vit import run_tower

BATCH = 16


class Pictures(Dataset[np.ndarray]):
    """Item i: uint8 pictures (n, 224, 224, 3); BATCH scenes, or the distinct frames of one clip."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return -(-self.count // BATCH) if self.kind == "scenes" else self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if self.kind == "clips":
            return draw_clip(sample_clip(index), distinct=True)
        seeds = range(index * BATCH, min(self.count, (index + 1) * BATCH))
        return np.stack([draw_scene(sample_scene(seed)) for seed in seeds])


def features(tower: torch.nn.Module, kind: str, count: int, device: str) -> Iterator[Tensor]:
    for pictures in tqdm(DataLoader(Pictures(kind, count), batch_size=None, num_workers=1), desc=kind, mininterval=10):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            yield run_tower(tower, normalise(np.asarray(pictures)).to(device))[:, 1:].to("cpu", torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder with vit.pt")
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--only", choices=("scenes", "clips"), help="write one of the two files, the other being there")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tower = build_model(build_config()).model.vision_tower.to(args.device).eval()
    state = torch.load(args.run / "vit.pt", map_location=args.device, weights_only=True)
    tower.load_state_dict(state["tower"])
    squares, total, count = 0.0, torch.zeros(tower.config.hidden_size), 0
    for kind, number in (("scenes", args.scenes), ("clips", args.clips)):
        if args.only not in (None, kind):
            continue
        with (args.run / f"{kind}.bin").open("wb") as file:
            for block in features(tower, kind, number, args.device):
                file.write(block.view(torch.uint16).numpy().tobytes())
                squares, count = squares + block.float().square().mean().item(), count + 1
                total += block.float().mean((0, 1))
    if args.only == "clips":
        return
    info = {"scenes": args.scenes, "clips": args.clips, "tokens": IMAGE_TOKENS, "width": tower.config.hidden_size}
    mean = total / count
    info |= {"scale": (squares / count - mean.square().mean().item()) ** 0.5, "vit_step": state["step"]}
    info["mean"] = [round(v, 4) for v in mean.tolist()]
    (args.run / "features.json").write_text(json.dumps(info, indent=2) + "\n")
    print({key: value for key, value in info.items() if key != "mean"})


if __name__ == "__main__":
    main()

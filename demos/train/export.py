"""Write the model of a run's checkpoint as a Hugging Face folder (bfloat16); each file is moved into place at once.

python -m demos.train.export --run RUN --start FOLDER --out mm/models/weights/tiny
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from demos.train.model import build_config, build_model, save_weights

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder with lm.pt")
    parser.add_argument("--start", type=Path, required=True, help="folder with tokenizer and processor")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.run / "lm.pt", map_location="cpu", weights_only=True)
    model = build_model(build_config())
    model.load_state_dict(state["model"])
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        save_weights(model, Path(folder))
        for name in PROCESSOR_FILES:
            shutil.copy(args.start / name, folder)
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            file.replace(args.out / file.name)
    print(f"step {state['step']} in {args.out}")


if __name__ == "__main__":
    main()

"""Ask a model about the pictures that its training's generator did not draw, and print every answer, wrong ones too.

Greedy decoding through the engine. Prints a table in Markdown, with the share of sensible answers by kind of picture.

    python -m demos.samples.outside.ask [--model tiny] [--out FILE] [--sheet FILE]
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

import mm
from serve.evaluation.report import markdown
from serve.evaluation.scoring import content, plain

FOLDER = Path(__file__).parent
SHOWN = 120  # characters of an answer


def lines() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]


def is_sensible(answer: str, line: dict) -> bool:
    """`equals`: the answer is one of them, as `plain` sees it; `says`: it has all of the phrases and no long tail."""
    if "says" in line:
        return (
            all(plain(phrase) in plain(answer) for phrase in line["says"]) and len(content(answer)) <= line["at_most"]
        )
    return plain(answer) in {plain(right) for right in line["equals"]}


def table(asked: list[tuple[dict, str]]) -> str:
    rows = [
        [
            Path(line["file"]).stem,
            line["question"],
            " / ".join(line.get("equals") or [f"... {phrase} ..." for phrase in line["says"]]),
            shortened(answer),
            "yes" if is_sensible(answer, line) else "no",
        ]
        for line, answer in asked
    ]
    return markdown(["picture", "question", "sensible", "answer", "is it?"], rows)


def shortened(answer: str) -> str:
    """On one line, without characters that would end a cell, and not too long."""
    line = " ".join(answer.split()).replace("|", "/")
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def shares(asked: list[tuple[dict, str]]) -> str:
    """By kind: questions answered sensibly, and pictures with at least one, and with only, sensible answers."""
    by_picture: dict[str, list[bool]] = {}
    right, total = Counter(), Counter()
    for line, answer in asked:
        sensible = is_sensible(answer, line)
        by_picture.setdefault(line["file"], []).append(sensible)
        right[line["kind"]] += sensible
        total[line["kind"]] += 1
    right["all"], total["all"] = right.total(), total.total()
    rows = [[kind, f"{right[kind]} of {total[kind]}", f"{right[kind] / total[kind]:.2f}"] for kind in total]
    every, some = sum(map(all, by_picture.values())), sum(map(any, by_picture.values()))
    pictures = f"{len(by_picture)} pictures: every answer sensible on {every}, at least one on {some}."
    return markdown(["kind", "sensible", "share"], rows) + f"\n\n{pictures}"


def sheet(path: Path) -> None:
    """All pictures on one, with their names."""
    files, columns = sorted(FOLDER.glob("*.png")), 8
    rows = -(-len(files) // columns)
    whole = Image.new("RGB", (columns * 232, rows * 250), "gray")
    draw = ImageDraw.Draw(whole)
    for i, file in enumerate(files):
        x, y = i % columns * 232 + 4, i // columns * 250 + 4
        whole.paste(Image.open(file).convert("RGB"), (x, y))
        draw.text((x + 2, y + 228), file.stem, fill="white")
    whole.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the pictures and stop")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet)
        return
    model = mm.load(args.model, num_threads=1)
    options = {"temperature": 0.0, "max_new_tokens": 96}
    asked = [
        (line, model.generate(line["question"], images=[FOLDER / line["file"]], **options).text) for line in lines()
    ]
    text = f"{shares(asked)}\n\n{table(asked)}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

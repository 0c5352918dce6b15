"""The language of questions: whole templates, phrases from which frames make questions, and many variations of both.

"{}" is what is asked about: "star", "red text", ... Each kind has direct questions, noun phrases ("the color of the
{}", for "Name ...", "What is ...?") and clauses ("what color the {} is", for "Can you tell me ...?"). Some templates of
each kind, and some frames, are kept out of the training: `unseen=True` asks with them only.
"""

import numpy as np

from demos.train.data.clip_wordings import CLIP_WORDINGS
from demos.train.data.scene_wordings import SCENE_WORDINGS

NOUN_FRAMES = (
    "What is {}?",
    "Name {}.",
    "Give {}.",
    "Give me {}.",
    "Tell me {}.",
    "State {}.",
    "Say {}.",
    "Find {}.",
    "I need {}.",
    "Identify {}.",
    "Do you know {}?",
)
CLAUSE_FRAMES = (
    "Tell me {}.",
    "Can you tell me {}?",
    "Could you tell me {}?",
    "Could you say {}?",
    "Do you know {}?",
    "Can you see {}?",
    "I would like to know {}.",
    "I'd like to know {}.",
    "I want to know {}.",
    "Say {}.",
    "Find out {}.",
)
HELD_NOUN_FRAMES = ("Report {}.", "Let me have {}.", "Would you give me {}?")
HELD_CLAUSE_FRAMES = ("I wonder {}.", "Let me know {}.", "Would you tell me {}?")

IMAGE, VIDEO = ("image", "picture", "photo"), ("video", "clip")
BRIEF = (" Answer with one word.", " Answer briefly.", " Be brief.", " Short answer.", " Just the answer.")
OPENERS = ("Look at the {}. ", "Here is the {}. ", "Question: ", "Hi! ", "Look carefully. ", "About this {}: ")
SPARE = "tell me you can could would like to know please say give find state do does is are the there"
ASIDES = (
    "elsewhere",
    "everywhere",
    "nowhere",
    "wherever",
    "whatever",
    "somewhat",
    "somehow",
    "anyhow",
    "however",
    "whichever",
)
LONG = {"caption", "tour", "list", "read", "read only", "happens", "first", "last"}  # not to be answered in one word
WORDINGS = SCENE_WORDINGS | CLIP_WORDINGS


def dress(rng: np.random.Generator, text: str, *, short: bool, video: bool) -> str:
    """The question as people type it: opened, closed, contracted, spelled and punctuated in various ways."""
    medium = str(rng.choice(VIDEO if video else IMAGE))
    if video:
        text = text.replace("image", medium).replace("picture", medium).replace("photo", medium)
    elif rng.random() < 0.3:
        text = text.replace("image", medium).replace("picture", medium)
    if text[-1] == "?" and not any(word in text for word in (*IMAGE, *VIDEO, "chart")) and rng.random() < 0.15:
        text = f"{text[:-1]} in {rng.choice(('the', 'this'))} {medium}?"
    if rng.random() < 0.2:
        for start in ("What", "Where"):
            text = text.replace(f"{start} is ", f"{start}'s ", 1) if text.startswith(f"{start} is ") else text
    if rng.random() < 0.3:
        text = text.replace("color", "colour").replace("Color", "Colour")
    polite = rng.random()
    if polite < 0.05:
        text = f"Please {uncapitalise(text)}" if text[-1] == "." else f"{text[:-1]}, please?"
    elif polite < 0.1:
        text = OPENERS[rng.integers(len(OPENERS))].format(medium) + text
    if short and rng.random() < 0.08:
        text += BRIEF[rng.integers(len(BRIEF))]
    elif rng.random() < 0.1:
        text = text.rstrip("?.")
    if rng.random() < 0.12:
        text = uncapitalise(text)
    return text


def disturb(rng: np.random.Generator, text: str) -> str:
    """The question with an invented word put in, or in the place of a word that matters little.

    For training: what is asked is to be found among words never met before.
    """
    words = text.split(" ")
    spare = [i for i, word in enumerate(words) if word.lower() in SPARE.split()]
    if spare and rng.random() < 0.5:
        words[spare[rng.integers(len(spare))]] = invented(rng)
    else:
        words.insert(int(rng.choice((0, len(words), rng.integers(len(words) + 1)))), invented(rng))
    return " ".join(words)


def invented(rng: np.random.Generator) -> str:
    """A word of random letters, or one that looks like a question word and is none."""
    if rng.random() < 0.35:
        return pick(rng, ASIDES)
    letters = [
        str(rng.choice(list("aeiou" if i % 2 else "bcdfghjklmnprstvwy"))) for i in range(int(rng.integers(2, 8)))
    ]
    word = "".join(letters)
    return word.capitalize() if rng.random() < 0.4 else word


def templates(kind: str) -> list[str]:
    """All undressed templates of a kind that training uses."""
    wording = WORDINGS[kind]
    framed = [frame.format(noun) for frame in NOUN_FRAMES for noun in wording.nouns]
    framed += [frame.format(clause) for frame in CLAUSE_FRAMES for clause in wording.clauses]
    return [*wording.direct, *framed]


def draw_wording(rng: np.random.Generator, kind: str, *parts: str, unseen: bool = False, video: bool = False) -> str:
    """A question of a kind about the parts; unseen: in a template that training never uses."""
    wording = WORDINGS[kind]
    direct, noun_frames, clause_frames = wording.direct, NOUN_FRAMES, CLAUSE_FRAMES
    if unseen:
        direct, noun_frames, clause_frames = wording.held, HELD_NOUN_FRAMES, HELD_CLAUSE_FRAMES
    form = rng.random()
    if form < 0.3 and wording.nouns:
        text = pick(rng, noun_frames).format(pick(rng, wording.nouns))
    elif form > 0.75 and wording.clauses:
        text = pick(rng, clause_frames).format(pick(rng, wording.clauses))
    else:
        text = pick(rng, direct)
    return dress(rng, text.format(*parts), short=kind not in LONG, video=video)


def pick(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def uncapitalise(text: str) -> str:
    return text if text.startswith(("I ", "I'")) else text[0].lower() + text[1:]

"""Everything that asks, in one place to import from; and the words that answers are made of."""

from demos.train.data.asking import Asker, Composer, Focus, Question, Span, content
from demos.train.data.clip_questions import CLIP_KINDS, EVENT_KINDS, FRAME_TOKENS, POOL, ClipAsker
from demos.train.data.language import WORDINGS, disturb, draw_wording, templates
from demos.train.data.scene_questions import SCENE_KINDS, SHORT_KINDS, SceneAsker
from demos.train.data.several import PICTURE_TOKENS, SeveralAsker
from demos.train.data.things import COLORS, COLUMNS, ROWS, SHAPES, SIZES

__all__ = [
    "CLIP_KINDS",
    "EVENT_KINDS",
    "FRAME_TOKENS",
    "PICTURE_TOKENS",
    "POOL",
    "SCENE_KINDS",
    "SHORT_KINDS",
    "WORDINGS",
    "Asker",
    "ClipAsker",
    "Composer",
    "Focus",
    "Question",
    "SceneAsker",
    "SeveralAsker",
    "Span",
    "answer_words",
    "content",
    "disturb",
    "draw_wording",
    "templates",
]


def answer_words() -> list[str]:
    """Every word that answers are made of, apart from the characters of texts: each is to be one token."""
    words = [*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, "yes", "no", *map(str, range(10)), "up", "down"]
    words += ["A", "An", "The", "At", "There", "a", "an", "the", "at", "is", "there", "it", "says", "text", "object"]
    words += ["image", "shows", "display", "bar", "chart", "first", "second", "third", "both", "none"]
    words += ["moves", "turns", "becomes", "appears", "disappears", "grows", "shrinks", "changes", "from", "to"]
    return list(dict.fromkeys(words))

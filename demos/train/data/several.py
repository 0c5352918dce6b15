"""Questions on two or three pictures in one prompt: which of them shows something, or about one of them."""

import numpy as np

from demos.train.data.asking import Asker, Focus, Question, Span, with_article
from demos.train.data.scene_questions import SceneAsker
from demos.train.data.things import GRID, Scene

ORDINALS = ("first", "second", "third")
PICTURE_TOKENS = GRID * GRID
OF_ONE = ("color", "shape", "where", "count", "read")


class SeveralAsker(Asker):
    """Asks about scenes that stand side by side; visual tokens are those of one picture after the other."""

    def __init__(self, scenes: list[Scene], rng: np.random.Generator, *, unseen: bool = False) -> None:
        super().__init__(rng, unseen=unseen)
        self.askers = [SceneAsker(scene, rng, unseen=unseen) for scene in scenes]

    def marked(self) -> set[int]:
        return {i * PICTURE_TOKENS + p for i, asker in enumerate(self.askers) for p in asker.marked()}

    def ask_which(self) -> Question | None:
        """The picture that alone shows a thing of a name."""
        names = [{t.name for t in asker.things} for asker in self.askers]
        i = int(self.rng.integers(len(names)))
        if not (own := sorted(names[i].difference(*(names[:i] + names[i + 1 :])))):
            return None
        name = self.pick(own)
        thing = [t.name for t in self.askers[i].things].index(name)
        focus = shift(self.askers[i].patches[thing], i)
        return Question("which", self.word("which image", with_article(name)), ORDINALS[i], focus)

    def ask_one(self) -> Question | None:
        """A question on one of the pictures."""
        i = int(self.rng.integers(len(self.askers)))
        question = self.askers[i].ask(kind := self.pick(OF_ONE))
        if not question:
            return None
        where, text = f"in the {ORDINALS[i]} {self.pick(('image', 'picture'))}", question.text
        stop = text[-1] if text[-1] in "?." else ""
        text = f"{text.rstrip('?.')} {where}{stop}" if self.chance(0.6) else f"{where.capitalize()}: {text}"
        spans = tuple(Span(s.start, s.stop, shift(s.focus, i)) for s in question.spans)
        return Question(f"one {kind}", text, question.answer, shift(question.focus, i), spans=spans)


def shift(focus: Focus, picture: int) -> Focus:
    return tuple(picture * PICTURE_TOKENS + p for p in focus)

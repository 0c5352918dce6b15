"""Text of a request, marked so that a rendered chat template shows which characters came from it.

Control tokens are spelled with few characters, such as `<|im_start|>`. In text of a request, each character that a
control token may hold is replaced by a private character of Unicode, its mark. Whatever a template does with such text
(cut it, join it, repeat it), a control token in the result that has no marks was written by the template.

Templates also read the text: they trim it, measure it, compare it. `UserText` answers them as the original would. Where
a template loses the class, only the marks remain, and the text is still known as the request's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar, cast

from mm.errors import InvalidRequest

T = TypeVar("T")

_FIRST_MARK, _LAST_MARK = 0x40000, 0x10FFFD
"""Unicode has no characters in this range but private ones."""
_HIGH = re.compile(f"[{chr(_FIRST_MARK)}-{chr(0x10FFFF)}]")


def high_characters(texts: Iterable[str]) -> frozenset[str]:
    """The characters of the texts that could be taken for marks."""
    found = set[str]()
    for text in texts:
        if not text.isascii() and _HIGH.search(text):
            found |= set(_HIGH.findall("".join(set(text))))
    return frozenset(found)


@functools.cache
def _cased() -> tuple[str, ...]:
    """All characters that have another case. The last script with cases ends at U+1E943."""
    return tuple(c for c in map(chr, range(0x1E944)) if _cases(c) != {c})


def _cases(character: str) -> set[str]:
    return {character, *character.upper(), *character.lower(), *character.title(), *character.casefold()}


def closed_under_case(characters: Iterable[str]) -> str:
    """The characters, and all that become one of them by changes of case."""
    closed = set(characters)
    while more := {c for c in _cased() if c not in closed and not _cases(c).isdisjoint(closed)}:
        closed |= more
    return "".join(sorted(closed))


class Marks:
    """The marks of one rendering.

    Args:
        alphabet: The characters that get marks; see `closed_under_case`.
        taken: Characters that cannot be marks, since a text holds them.

    Raises:
        InvalidRequest: A text holds nearly all private characters.
    """

    def __init__(self, alphabet: str, taken: frozenset[str] = frozenset()) -> None:
        free = (c for c in map(chr, range(_LAST_MARK, _FIRST_MARK - 1, -1)) if c not in taken)
        marks = list(islice(free, len(alphabet)))
        if len(marks) < len(alphabet):
            raise InvalidRequest("the text holds nearly all unassigned characters of Unicode; send less odd text")
        self._mark = {ord(c): mark for c, mark in zip(alphabet, marks, strict=True)}
        self._unmark = {ord(mark): c for c, mark in zip(alphabet, marks, strict=True)}
        self._any = re.compile(f"[{''.join(marks)}]") if marks else re.compile("(?!)")

    @contextmanager
    def used(self) -> Generator[None]:
        """A context in which templates are rendered with these marks."""
        token = _MARKS.set(self)
        try:
            yield
        finally:
            _MARKS.reset(token)

    def mark(self, text: str) -> str:
        """The text with a mark in place of each character that has one."""
        return str.translate(text, self._mark)

    def unmark(self, text: str) -> str:
        """The text without marks. It is as long as before."""
        return str.translate(text, self._unmark) if self.has_marks(text) else str.__str__(text)

    def has_marks(self, text: str) -> bool:
        return not str.isascii(text) and self._any.search(text) is not None

    def text(self, text: str) -> UserText:
        """Text of the request, as a template gets it."""
        return UserText.of(self.mark(text), text)


_MARKS: ContextVar[Marks] = ContextVar("marks")


def seen(value: T) -> T:
    """What a template computed. A string with marks becomes a `UserText` again."""
    if not isinstance(value, str) or isinstance(value, UserText):
        return value
    marks = _MARKS.get()
    return _as(value, UserText.of(str.__str__(value), marks.unmark(value))) if marks.has_marks(value) else value


def unmarked(value: T) -> T:
    """A value without marks, also inside lists and mappings."""
    if isinstance(value, str):
        return _as(value, value.raw if isinstance(value, UserText) else _MARKS.get().unmark(value))
    given = cast(object, value)
    if isinstance(given, dict):
        items = cast("dict[object, object]", given).items()
        return _as(value, {unmarked(key): unmarked(item) for key, item in items})
    if isinstance(given, list | tuple):
        found = [unmarked(item) for item in cast("list[object]", given)]
        return _as(value, found if isinstance(given, list) else tuple(found))
    return value


def as_users(value: T) -> T:
    """A string computed from unmarked text: all of it counts as the request's."""
    return _as(value, _MARKS.get().text(value)) if isinstance(value, str) else value


def _as(like: T, value: object) -> T:
    """The value, which stands for `like` and has its type."""
    return cast(T, value)


class UserText(str):
    """A string with text of a request in it. Its characters are marked; its methods work on the unmarked string.

    Attributes:
        raw: The unmarked string, of the same length.
    """

    __slots__ = ("raw",)
    raw: str

    def __new__(cls, marked: str) -> UserText:
        return cls.of(marked, _MARKS.get().unmark(marked))

    @classmethod
    def of(cls, marked: str, raw: str) -> UserText:
        self = str.__new__(cls, marked)
        self.raw = raw
        return self

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        return _MARKS.get().mark(repr(self.raw))

    def __iter__(self) -> Iterator[UserText]:
        return (self.cut(i, i + 1) for i in range(len(self)))

    def __getitem__(self, index: Any) -> UserText:
        return UserText.of(str.__getitem__(self, index), self.raw[index])

    def __add__(self, other: Any) -> Any:
        return seen(str.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return seen(str.__add__(other, self))

    def cut(self, start: int, stop: int) -> UserText:
        """The characters from `start` to `stop`."""
        return UserText.of(str.__getitem__(self, slice(start, stop)), self.raw[start:stop])


def _answer(name: str) -> Callable[..., Any]:
    """A method that does not return text: the unmarked string's."""
    method = getattr(str, name)

    def answer(self: UserText, *args: Any, **options: Any) -> Any:
        return method(self.raw, *unmarked(args), **options)

    return answer


def _computed(name: str) -> Callable[..., Any]:
    """A method that returns other text, all of which counts as the request's."""
    answer = _answer(name)

    def computed(self: UserText, *args: Any, **options: Any) -> Any:
        return as_users(answer(self, *args, **options))

    return computed


def _strip(left: bool, right: bool) -> Callable[..., UserText]:
    def strip(self: UserText, characters: str | None = None) -> UserText:
        characters = unmarked(characters)
        stop = len(self.raw.rstrip(characters)) if right else len(self)
        start = len(self) - len(self.raw.lstrip(characters)) if left else 0
        return self.cut(start, max(start, stop))

    return strip


def _split(name: str) -> Callable[..., list[UserText]]:
    method = getattr(str, name)

    def split(self: UserText, sep: str | None = None, maxsplit: int = -1) -> list[UserText]:
        sep = unmarked(sep)
        found, end = list[UserText](), 0
        for piece in method(self.raw, sep, maxsplit):
            # Between pieces there is the separator, or blanks, with which no later piece begins.
            start = self.raw.index(piece, end) if sep is None else end
            found.append(self.cut(start, start + len(piece)))
            end = start + len(piece) + len(sep or "")
        return found

    return split


def _partition(name: str) -> Callable[..., tuple[UserText, ...]]:
    method = getattr(str, name)

    def partition(self: UserText, sep: str) -> tuple[UserText, ...]:
        found, end = list[UserText](), 0
        for piece in method(self.raw, unmarked(sep)):
            found.append(self.cut(end, end + len(piece)))
            end += len(piece)
        return tuple(found)

    return partition


def _splitlines(self: UserText, keepends: bool = False) -> list[UserText]:
    found, end = list[UserText](), 0
    for whole, shown in zip(self.raw.splitlines(True), self.raw.splitlines(keepends), strict=True):
        found.append(self.cut(end, end + len(shown)))
        end += len(whole)
    return found


def _replace(self: UserText, old: str, new: str, count: int = -1) -> Any:
    if not old:
        return as_users(self.raw.replace("", unmarked(new), count))
    return seen(str.join(new, cast("list[str]", cast(Any, self).split(old, count))))


def _removed(name: str) -> Callable[..., UserText]:
    method = getattr(str, name)

    def removed(self: UserText, affix: str) -> UserText:
        length = len(method(self.raw, unmarked(affix)))
        start = len(self) - length if name == "removeprefix" else 0
        return self.cut(start, start + length)

    return removed


def _case(name: str) -> Callable[..., Any]:
    """A change of case. Characters without a mark are the template's, or no part of any control token."""
    method = getattr(str, name)

    def changed(self: UserText) -> Any:
        raw, marks = self.raw, _MARKS.get()
        new: str = method(raw)
        marked = marks.mark(new)
        if len(new) != len(raw) or str.__eq__(marks.mark(raw), self):
            return UserText.of(marked, new)
        mixed = zip(str.__iter__(self), raw, new, marked, strict=True)
        return seen("".join(plain if old == was else mark for was, old, plain, mark in mixed))

    return changed


def _join(self: UserText, items: Iterable[str]) -> Any:
    return seen(str.join(self, items))


def _repeat(self: UserText, times: Any) -> UserText:
    return UserText.of(str.__mul__(self, times), self.raw * times)


_CASES = ("upper", "lower", "casefold", "swapcase", "title", "capitalize")
_TEXTS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "__mod__", "__rmod__", "format", "format_map")
_OWN: dict[str, Callable[..., Any]] = {
    "join": _join,
    "__mul__": _repeat,
    "__rmul__": _repeat,
    "strip": _strip(True, True),
    "lstrip": _strip(True, False),
    "rstrip": _strip(False, True),
    "split": _split("split"),
    "rsplit": _split("rsplit"),
    "partition": _partition("partition"),
    "rpartition": _partition("rpartition"),
    "splitlines": _splitlines,
    "replace": _replace,
    "removeprefix": _removed("removeprefix"),
    "removesuffix": _removed("removesuffix"),
}
_KEPT = vars(UserText).keys() | vars(object).keys() | {"__len__", "__getnewargs__", "maketrans"}


def _method(name: str) -> Callable[..., Any]:
    if name in _OWN:
        return _OWN[name]
    if name in _CASES:
        return _case(name)
    return _computed(name) if name in _TEXTS else _answer(name)


_COMPARED = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}

for _each in (vars(str).keys() - _KEPT) | _COMPARED:
    setattr(UserText, _each, _method(_each))

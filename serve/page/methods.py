"""The methods to choose from, by the stage at which they act; those that do not fit are greyed with the reason.

Native check boxes: the keyboard, screen readers and labels work without further ado.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

from mm.plugins.reducer import Stage
from serve.page.choices import ReducerChoice

TITLES: dict[Stage, str] = {
    Stage.PIXELS: "In the processor, on pixels",
    Stage.BEFORE_VIT: "Before the vision tower",
    Stage.IN_VIT: "Inside the vision tower",
    Stage.TEMPORAL: "Along a clip's time",
    Stage.PRE_LLM: "Between tower and decoder",
    Stage.IN_PREFILL: "Inside the decoder, in prefill",
    Stage.IN_DECODE: "In the KV cache",
    Stage.PER_TOKEN: "At each generated token",
}
ONLY: dict[tuple[str, ...], str] = {("image",): "For pictures only", ("video",): "For clips only"}

CHOSEN = """() => JSON.stringify(
  [...document.querySelectorAll("#mm-methods input:checked:enabled")].map((box) => box.value))"""
"""The names of the chosen methods as JSON, in the browser."""

ON_CHANGE = "element.addEventListener('change', () => trigger('change'));"


def misfits(choices: Sequence[ReducerChoice], refusals: Mapping[str, str], kind: str | None) -> dict[str, str]:
    """Of the methods, those that cannot be used, and why.

    Args:
        refusals: What the server refuses with this model, with its words.
        kind: Of the chosen file; None where there is none yet.
    """
    medium = {c.name: ONLY[c.kinds] for c in choices if kind is not None and kind not in c.kinds and c.kinds in ONLY}
    model = {c.name: _sentence(refusals[c.name]) for c in choices if c.name in refusals}
    return medium | model


def picker(choices: Sequence[ReducerChoice], reasons: Mapping[str, str], chosen: Collection[str]) -> str:
    """Check boxes in one group per stage, as HTML.

    Args:
        reasons: Name to why it cannot be used.
    """
    groups = [(stage, [choice for choice in choices if choice.stage == stage.value]) for stage in Stage]
    return "".join(_group(TITLES[stage], found, reasons, chosen) for stage, found in groups if found)


def _group(title: str, choices: Sequence[ReducerChoice], reasons: Mapping[str, str], chosen: Collection[str]) -> str:
    boxes = "".join(_box(choice, reasons.get(choice.name), choice.name in chosen) for choice in choices)
    because: dict[str, list[str]] = {}
    for choice in choices:
        if choice.name in reasons:
            because.setdefault(reasons[choice.name], []).append(choice.name)
    notes = "".join(
        f'<p class="mm-why">{escape(reason)}{": " + ", ".join(names) if reason in ONLY.values() else ""}.</p>'
        for reason, names in because.items()
    )
    return f'<fieldset class="mm-stage"><legend>{escape(title)}</legend><div>{boxes}</div>{notes}</fieldset>'


def _box(choice: ReducerChoice, reason: str | None, is_chosen: bool) -> str:
    name, about = escape(choice.name), escape(reason or choice.summary)
    state = " disabled" if reason else " checked" if is_chosen else ""
    shown = "mm-method mm-unfit" if reason else "mm-method"
    return (
        f'<label class="{shown}" title="{about}"><input type="checkbox" value="{name}" '
        f'aria-description="{about}"{state}><span>{name}</span></label>'
    )


def _sentence(text: str) -> str:
    return text.strip().rstrip(".")

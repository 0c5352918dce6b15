"""What plugins promise, and the one registry that finds them.

Reducers, drafters, encoders and model families are found through entry points of the installed distributions: ours
arrive by the same road as a stranger's. Listing names imports no plugin. Reducers are immutable and shared between
requests; they see tensors and a small context, never a model class.

A reducer's or drafter's specification, wherever one is written (command line, request, Python), has one grammar:

    name                              divprune
    name:option=value,option=value    divprune:keep_ratio=0.25
    one + another                     uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5
    a list as a value                 pyramiddrop:at_layers=[8,16,24]

Reducers act one behind the other; of several drafters the first that has something to propose is heard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from mm.core.data import Grid, Image, Kind, Message, Positions, Prompt, Video, VisualTokens
from mm.core.drafting import Drafter
from mm.core.errors import IncompatiblePlugin, InvalidOption, MissingPackage, PluginError, UnknownPlugin, nearest

PluginKind = Literal["reducer", "drafter", "encoder", "family"]
KINDS: dict[PluginKind, str] = {
    "reducer": "mm.reducers",
    "drafter": "mm.drafters",
    "encoder": "mm.encoders",
    "family": "mm.families",
}
"""Plugin kind to entry-point group."""


Count = Literal["fixed", "bounded"]

CLS_ATTENTION = "cls_attention"
"""Evidence (H, N) float32: how much [CLS] attends to each token in the block that the features come from."""

ATTENTION_RECEIVED = "attention_received"
"""Evidence (H, N) float32: how much attention each token receives in the block that the features come from: [CLS]
attention where the tower has [CLS], else the mean over all tokens of the picture. A cell of several patches has their
mean."""

TOWER_KEYS = "tower_keys"
"""Evidence (head width, N) float32: each token's key in that block, before any rotation, averaged over heads."""

TOWER_FEATURES = "tower_features"
"""Evidence (tower width, N) float32: each token as the tower leaves it, before the projector."""

BLOCK_KEYS = "block_keys"
"""Not evidence of tokens: an encoder that provides it hosts a reducer of the stage IN_VIT, see `InTower`."""

TEXT_EMBEDDINGS = "text_embeddings"
"""Not per token, and of the question: see `ReduceContext.text_embeddings` and `ReadsText`."""


class Stage(Enum):
    """Where a reducer acts, in the order a token meets them."""

    IN_VIT = "in_vit"
    TEMPORAL = "temporal"
    PRE_LLM = "pre_llm"
    IN_PREFILL = "in_prefill"
    IN_DECODE = "in_decode"


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reducer's decision about the N tokens of one item. The engine applies it to every per-token plane.

    Attributes:
        keep: (k,) int64, ascending and unique: the kept tokens, or the anchors of merged ones.
        merge: (k, N) sparse or dense weights, rows summing to 1, or None when kept tokens stay as they are.
        sizes: (k,) float32, how many original tokens each stands for; None gathers the input's.
        protected: (k,) bool, kept tokens that later stages have to keep too; None gathers the input's.
    """

    keep: Tensor
    merge: Tensor | None = None
    sizes: Tensor | None = None
    protected: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReduceContext:
    """What a reducer may know beside the tokens.

    Attributes:
        evidence: What the tower observed, by the names in `Reducer.needs`.
        text_embeddings: (T, D), the question's tokens as the decoder embeds them; for reducers that need
            `TEXT_EMBEDDINGS`. No rows where nothing was asked.
    """

    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    text_embeddings: Tensor | None = None


@runtime_checkable
class Reducer(Protocol):
    """Fewer visual tokens out of many. Immutable; options are its dataclass fields.

    The four flags are class variables of most reducers; a pipeline derives them from its stages. Two more are optional:
    `kinds`, what it reduces ("image", "video" or both, the default; items of another kind stay as they are), and
    `needs_grid`, true where every cell of the grid has to be there, so that no other reducer may come first.

    Attributes:
        stage: Where it acts.
        needs: Names of the evidence it must be given.
        query_aware: Whether the result depends on the question.
        count: "fixed" when `plan` is exact, "bounded" when it is an upper bound.
    """

    @property
    def stage(self) -> Stage: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def query_aware(self) -> bool: ...

    @property
    def count(self) -> Count: ...

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """Tokens kept of `num_tokens`, before anything is encoded.

        Args:
            grid: Cells of the unreduced item; None takes the tokens as one row.
            kind: What the item is.
        """
        ...

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        """Decide about one item's tokens, after the projector and before the decoder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Which tokens of a batch become one. They become their mean, weighted by how many patches each stands for.

    Attributes:
        slots: (B, n) int64, where each of n tokens goes among the m that are left.
        anchors: (B, m) int64, which of the n tokens each of these stands in the place of; it is among its own.
    """

    slots: Tensor
    anchors: Tensor


class InTower(Protocol):
    """A reducer of the stage IN_VIT: merges tokens in the tower's blocks, between attention and MLP."""

    def merges(self, num_patches: int, num_blocks: int) -> tuple[int, ...]:
        """How many tokens each block merges away, so that all pictures of a batch keep equally many.

        Raises:
            InvalidOption: It cannot be done in so many blocks.
        """
        ...

    def match(self, keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
        """Which tokens are merged in one block.

        Args:
            keys: (B, n, dh) float32, averaged over heads.
            num_merged: How many tokens fewer are left.
            num_prefix: Tokens in front that are no patches, [CLS] among them; they stay as they are, in front.
        """
        ...


class PrefillView(Protocol):
    """What a reducer sees of one prompt at the input of a decoder layer; see `mm.engine.step.PrefillView`."""

    layer: int
    num_layers: int
    hidden: Tensor
    visual: Tensor
    origins: Tensor
    items: Tensor
    item_sizes: tuple[int, ...]
    protected: Tensor

    @property
    def num_rows(self) -> int: ...

    def attention_rows(self, rows: Tensor, layer: int | None = None) -> Tensor: ...

    def keys(self) -> Tensor: ...


class InPrefill(Protocol):
    """A reducer of the stage IN_PREFILL: drops visual rows at the input of some decoder layers."""

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """At the input of which of `num_layers` layers it is asked, ascending; not 0."""
        ...

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        """(k,) int64, ascending: which of `view.visual` stay, in this layer and all above."""
        ...


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """What a reducer sees of one prompt in the cache, layer by layer.

    Attributes:
        lengths: Rows that each layer holds.
        visual: (V,) int64 per layer, which of these rows are visual.
        origins: (V,) int64 per layer, which of the prompt's visual rows these are, counted over all its items.
    """

    lengths: tuple[int, ...]
    visual: tuple[Tensor, ...]
    origins: tuple[Tensor, ...]


class InDecode(Protocol):
    """A reducer of the stage IN_DECODE: evicts rows from the cache once the prompt is in."""

    def prefill_done(self, view: CacheView) -> Mapping[int, Tensor]:
        """Layer to (k,) int64 rows of its cache that stay, ascending; layers not named keep all."""
        ...


class Encoder(Protocol):
    """Pixels to visual tokens.

    Attributes:
        provides: Names of the evidence it can supply.
        kinds: What it takes: "image", "video" or both.
        fingerprint: Names model and preprocessing, for cache keys.
    """

    provides: frozenset[str]
    kinds: frozenset[str]
    fingerprint: str

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order; `evidence` holds at least what `needs` names.

        One that provides `BLOCK_KEYS` also takes `merging`, the reducer inside the tower; evidence behind that is what
        `BEHIND_MERGING` names.
        """
        ...


class ReadsText(Protocol):
    """What an encoder that provides `TEXT_EMBEDDINGS` has beside `Encoder`."""

    def embed_text(self, text: str) -> Tensor:
        """(T, D): the text's tokens as the model's decoder embeds them; no rows for no text."""
        ...


class Family(Protocol):
    """What one model family knows beyond its decoder layers: template, placeholders, positions, splice."""

    max_context_tokens: int
    eos_token_ids: frozenset[int]

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        """The prompt's rows, in which every placeholder has become its item's kept tokens."""
        ...


@functools.cache
def _entry_points(kind: PluginKind) -> Mapping[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=KINDS[kind]):
        earlier = found.setdefault(point.name, point)
        if earlier.value != point.value:
            raise PluginError(f"two {kind}s are named {point.name!r}: {earlier.value} and {point.value}; uninstall one")
    return found


def names(kind: PluginKind) -> list[str]:
    """Registered names of a kind, sorted. Imports no plugin."""
    return sorted(_entry_points(kind))


def get(kind: PluginKind, name: str) -> Any:
    """The plugin class registered under `name`.

    Raises:
        UnknownPlugin: No such name.
        MissingPackage: It needs a package that is not installed.
    """
    points = _entry_points(kind)
    if name not in points:
        raise UnknownPlugin(kind, name, sorted(points))
    try:
        return points[name].load()
    except ModuleNotFoundError as error:
        raise MissingPackage(kind, name, error.name or str(error)) from error


def options_of(plugin: Any) -> dict[str, dataclasses.Field]:
    """The options a plugin class takes: its dataclass fields."""
    return {f.name: f for f in dataclasses.fields(plugin)} if dataclasses.is_dataclass(plugin) else {}


def create(kind: PluginKind, name: str, /, **options: Any) -> Any:
    """Build the plugin `name` with `options`.

    Raises:
        UnknownPlugin: No such name.
        InvalidOption: An option it does not have, or a value it refuses.
    """
    plugin = get(kind, name)
    known, takes_fields_only = options_of(plugin), dataclasses.is_dataclass(plugin)
    for option in options:
        if takes_fields_only and option not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise InvalidOption(name, option, f"does not exist{nearest(option, list(known))} (options: {allowed})")
    return plugin(**options)


COMMA = re.compile(r",(?![^\[]*\])")
"""Between options, not inside a list."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def parse_spec(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """The (name, options) pairs of a specification, in order.

    Raises:
        InvalidOption: The text does not follow the grammar.
    """
    return [_parse_one(part.strip(), spec) for part in spec.split("+")]


def _parse_one(part: str, spec: str) -> tuple[str, dict[str, Any]]:
    name, _, tail = part.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in COMMA.split(tail))):
        option, equals, value = item.partition("=")
        if not equals or not option.strip() or not value.strip():
            raise InvalidOption(name or spec, item, "is not of the form option=value")
        if option.strip() in options:
            raise InvalidOption(name, option.strip(), "is given twice")
        options[option.strip()] = _value(value.strip())
    if not name.strip():
        raise InvalidOption(spec, "name", "is missing; write name:option=value, joined by ' + '")
    return name.strip(), options


def build_reducer(spec: str, keep_ratio: float | None = None) -> Reducer:
    """The reducer, or the pipeline of several, that `spec` describes.

    Args:
        spec: See the module docstring.
        keep_ratio: Overrides the option of that name; only for a specification of one reducer.

    Raises:
        UnknownPlugin, InvalidOption: As `create`.
    """
    parts = parse_spec(spec)
    if keep_ratio is not None:
        if len(parts) > 1:
            raise InvalidOption(
                spec, "keep_ratio", "is ambiguous for several reducers; write it inside the specification"
            )
        name, options = parts[0]
        if "keep_ratio" not in options_of(get("reducer", name)):
            raise InvalidOption(name, "keep_ratio", "does not exist: this reducer has no such budget")
        parts = [(name, options | {"keep_ratio": keep_ratio})]
    reducers = [create("reducer", name, **options) for name, options in parts]
    return reducers[0] if len(reducers) == 1 else create("reducer", "pipeline", stages=tuple(reducers))


def build_drafter(spec: str) -> Drafter:
    """The drafter, or the hybrid of several, that `spec` describes.

    Raises:
        UnknownPlugin, InvalidOption: As `create`.
    """
    drafters = [create("drafter", name, **options) for name, options in parse_spec(spec)]
    return drafters[0] if len(drafters) == 1 else create("drafter", "hybrid", stages=tuple(drafters))


def canonical_spec(plugin: Any, kind: PluginKind = "reducer") -> str:
    """One text per distinct configuration, for cache keys and metrics. Parses back to an equal plugin."""
    stages = getattr(plugin, "stages", None)
    if stages is not None:
        return " + ".join(canonical_spec(stage, kind) for stage in stages)
    for name in names(kind):
        if get(kind, name) is type(plugin):
            options = {option: getattr(plugin, option) for option in options_of(type(plugin))}
            tail = ",".join(f"{option}={_written(value)}" for option, value in sorted(options.items()))
            return f"{name}:{tail}" if tail else name
    raise PluginError(f"{type(plugin).__qualname__} is not registered as a {kind}")


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def check_compatible(reducer: Reducer, encoder: Encoder, host: str) -> None:
    """Refuse a reducer that needs what the encoder does not supply.

    Raises:
        IncompatiblePlugin: Names what is missing.
    """
    missing = sorted(reducer.needs - encoder.provides)
    if missing:
        raise IncompatiblePlugin(type(reducer).__name__, host, missing)
    if (merging := tower_stage(reducer)) is not None:
        lost = sorted(reducer.needs - BEHIND_MERGING) + ([BLOCK_KEYS] if BLOCK_KEYS not in encoder.provides else [])
        if lost:
            behind = [f"{name} with {type(merging).__name__} in its tower" for name in lost]
            raise IncompatiblePlugin(type(reducer).__name__, host, behind)


BEHIND_MERGING = frozenset({BLOCK_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS})
"""What an encoder supplies, of what it provides, when tokens were merged inside its tower."""


def tower_stage(reducer: Reducer) -> InTower | None:
    """The reducer that acts inside the tower, if there is one.

    Raises:
        InvalidOption: There are several.
    """
    inside: list[Any] = [stage for stage in flat_stages(reducer) if stage.stage is Stage.IN_VIT]
    if len(inside) > 1:
        raise InvalidOption("pipeline", "stages", "take one reducer inside the tower, not several")
    return inside[0] if inside else None


def flat_stages(reducer: Reducer) -> tuple[Reducer, ...]:
    """The reducers of a pipeline, or the one there is."""
    return tuple(getattr(reducer, "stages", None) or (reducer,))


def encode_spec(reducer: Reducer) -> str:
    """Canonical text of what happens to an item's tokens before the decoder: all that encoded features depend on."""
    outside = [stage for stage in flat_stages(reducer) if stage.stage not in (Stage.IN_PREFILL, Stage.IN_DECODE)]
    return " + ".join(canonical_spec(stage) for stage in outside) or "none"


def inner_stages(reducer: Reducer) -> tuple[tuple[InPrefill, ...], tuple[InDecode, ...]]:
    """The reducers that act inside the decoder: in prefill, and on the cache. One may be both."""
    stages: tuple[Any, ...] = flat_stages(reducer)
    return (
        tuple(stage for stage in stages if hasattr(stage, "in_prefill")),
        tuple(stage for stage in stages if hasattr(stage, "prefill_done")),
    )


def positions_of(reducer: Reducer) -> Positions:
    """What the reducer wants of the positions behind what it drops: "compact" where one of its stages says so."""
    asked = (getattr(stage, "positions", "kept") for stage in flat_stages(reducer))
    return "compact" if "compact" in asked else "kept"


def least_keep_ratio(reducer: Reducer) -> float | None:
    """Tokens kept / tokens in, at worst; None where it depends on the picture or the question."""
    least, side = 1.0, 100
    for stage in flat_stages(reducer):
        ratio = getattr(stage, "keep_ratio", None)
        if ratio is None and stage.count == "fixed":
            ratio = stage.plan(side**2, (1, side, side)) / side**2
        if ratio is None:
            return None
        least *= ratio
    return least


CAPABILITIES = ("stage", "needs", "provides", "kinds", "query_aware", "count", "model_types", "trained")


def describe(kind: PluginKind) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per registered plugin, with its capabilities; imports the plugins.

    One that cannot be imported for want of a package has `unavailable` instead.
    """
    for name in names(kind):
        try:
            yield {"kind": kind, "name": name} | _capabilities(get(kind, name))
        except MissingPackage as error:
            yield {"kind": kind, "name": name, "summary": "", "unavailable": str(error), "options": {}}


def _capabilities(plugin: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"summary": (plugin.__doc__ or "").strip().split("\n")[0]}
    for flag in CAPABILITIES:
        value = getattr(plugin, flag, None)
        if value is None or callable(value) or isinstance(value, property):
            continue
        row[flag] = value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, frozenset) else value
    row["options"] = {
        option: None if f.default is dataclasses.MISSING else f.default for option, f in options_of(plugin).items()
    }
    return row


__all__ = [
    "ATTENTION_RECEIVED",
    "BEHIND_MERGING",
    "BLOCK_KEYS",
    "CLS_ATTENTION",
    "KINDS",
    "TEXT_EMBEDDINGS",
    "TOWER_FEATURES",
    "TOWER_KEYS",
    "CacheView",
    "Count",
    "Drafter",
    "Encoder",
    "Family",
    "Grid",
    "InDecode",
    "InPrefill",
    "InTower",
    "Matched",
    "PluginKind",
    "PrefillView",
    "ReadsText",
    "ReduceContext",
    "Reducer",
    "Reduction",
    "Stage",
    "build_drafter",
    "build_reducer",
    "canonical_spec",
    "check_compatible",
    "create",
    "describe",
    "encode_spec",
    "flat_stages",
    "get",
    "inner_stages",
    "least_keep_ratio",
    "names",
    "options_of",
    "parse_spec",
    "positions_of",
    "tower_stage",
]

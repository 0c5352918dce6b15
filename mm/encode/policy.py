"""Which reducer a request may use."""

from __future__ import annotations

from mm.config import ReducerPolicy
from mm.data.request import VisionOptions
from mm.encode.parts import EncodeParts
from mm.errors import ReducerNotAllowed
from mm.plugins.capabilities import check_compatible, least_keep_ratio
from mm.plugins.reducer import Reducer
from mm.plugins.spec import build_reducer, canonical_spec, parse_spec


def resolve_reducer(vision: VisionOptions, parts: EncodeParts) -> Reducer:
    """The reducer a request asks for, or the default one.

    Raises:
        PluginError: It is unknown, has bad options, or cannot work with this encoder.
    """
    reducer = build_reducer(vision.reducer or parts.reducer, vision.keep_ratio)
    if vision.reducer is not None or vision.keep_ratio is not None:
        check_allowed(reducer, parts.policy)
    check_compatible(reducer, parts.encoder, parts.host)
    return reducer


def check_allowed(reducer: Reducer, policy: ReducerPolicy) -> None:
    """Refuse what the operator does not let requests ask for.

    Raises:
        ReducerNotAllowed: Says what is allowed.
    """
    for name, _ in parse_spec(canonical_spec(reducer)):
        if policy.allowed and name not in policy.allowed:
            raise ReducerNotAllowed(
                f"requests to this server may not use the reducer {name!r}; allowed: {', '.join(policy.allowed)}"
            )
    if policy.min_keep_ratio is None:
        return
    least = least_keep_ratio(reducer)
    if least is None or least < policy.min_keep_ratio:
        told = "an unknown share" if least is None else f"{least:g}"
        raise ReducerNotAllowed(
            f"{canonical_spec(reducer)} keeps {told} of the visual tokens at worst; requests to this server may not go "
            f"below {policy.min_keep_ratio:g}"
        )

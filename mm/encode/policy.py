"""Which reducer a request may use."""

from __future__ import annotations

from mm.config import ReducerPolicy
from mm.data.request import VisionOptions
from mm.encode.parts import EncodeParts
from mm.errors import ReducerNotAllowed
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import ReducerSpec, reducer_or_default


def resolve_reducer(vision: VisionOptions, parts: EncodeParts) -> ReducerSpec:
    """The reducer that a request names, or the default one. Called once per request; the result is passed on.

    Raises:
        PluginError: It is unknown or broken, has wrong options, is not allowed, or cannot work with this encoder.
    """
    spec = reducer_or_default(vision.reducer, parts.reducer, vision.keep_ratio)
    if vision.reducer is not None or vision.keep_ratio is not None:
        check_allowed(spec, parts.policy)
    check_compatible(spec.plugin, parts.encoder, parts.host)
    return spec


def check_allowed(spec: ReducerSpec, policy: ReducerPolicy) -> None:
    """Refuse what the operator does not let requests name.

    Raises:
        ReducerNotAllowed: Names what is allowed.
    """
    for part in spec.parts:
        if policy.allowed and part.name not in policy.allowed:
            raise ReducerNotAllowed(
                f"requests to this server may not use the reducer {part.name!r}; allowed: {', '.join(policy.allowed)}"
            )
    if policy.min_keep_ratio is None:
        return
    least = spec.capabilities.least_keep_ratio
    if least is None or least < policy.min_keep_ratio:
        share = "an unknown share" if least is None else f"{least:g}"
        raise ReducerNotAllowed(
            f"{spec.canonical} keeps {share} of the visual tokens at worst; requests to this server may not go "
            f"below {policy.min_keep_ratio:g}"
        )

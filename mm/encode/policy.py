"""Which reducer a request may use."""

from __future__ import annotations

from mm.config import ReducerPolicy
from mm.data.request import VisionOptions
from mm.encode.parts import EncodeParts
from mm.errors import ReducerNotAllowed, shown
from mm.plugins.calls import BUILT
from mm.plugins.capabilities import check_compatible, names_of
from mm.plugins.spec import ReducerSpec, bind, parse_spec, reducer_or_default
from mm.plugins.weights import is_beside_model


def resolve_reducer(vision: VisionOptions, parts: EncodeParts) -> ReducerSpec:
    """The reducer that a request names, or the default one, with its weights if it is a learned one.

    Called once per request; the result is passed on.

    Raises:
        PluginError: It is unknown or broken, has wrong options, is not allowed, has no weights for this model, or
            cannot work with this encoder.
        ReducerOff: It failed again and again, and the policy's `on_error` is "fail".
    """
    names = tuple(part.name for part in parse_spec(vision.reducer or parts.reducer))
    limit_s = parts.calls.limits.reducer_timeout_s
    spec = parts.calls.call("reducer", names, BUILT, lambda: _resolve(vision, parts), timeout_s=limit_s)
    if parts.policy.on_error == "fail":
        parts.calls.check("reducer", names_of(spec.plugin))
    return spec


def _resolve(vision: VisionOptions, parts: EncodeParts) -> ReducerSpec:
    spec = reducer_or_default(vision.reducer, parts.reducer, vision.keep_ratio)
    is_asked = vision.reducer is not None or vision.keep_ratio is not None
    if is_asked:
        check_names(spec, parts)
    spec = bind(spec, parts.model, parts.device)
    if is_asked:
        check_budget(spec, parts.policy)
    check_compatible(spec.plugin, parts.encoder, parts.host)
    return spec


def check_names(spec: ReducerSpec, parts: EncodeParts) -> None:
    """Refuse reducers and weights that the operator does not let requests name. Nothing is read for it.

    Raises:
        ReducerNotAllowed: Names what is allowed.
    """
    policy = parts.policy
    for part in spec.parts:
        if policy.allowed and part.name not in policy.allowed:
            raise ReducerNotAllowed(
                f"requests to this server may not use the reducer {shown(part.name)}; "
                f"allowed: {', '.join(policy.allowed)}"
            )
        weights = str(part.options.get("weights", "")).partition("@")[0]
        default = {str(own.options.get("weights", "")) for own in parse_spec(parts.reducer)}
        if not is_beside_model(weights) and weights not in {*policy.weights, *default}:
            allowed = ", ".join(("those beside the model", *policy.weights))
            raise ReducerNotAllowed(
                f"requests may not give {part.name!r} the weights {weights!r}; allowed: {allowed} (the operator allows "
                "more with --allow-weights, or in the default reducer)"
            )


def check_budget(spec: ReducerSpec, policy: ReducerPolicy) -> None:
    """Refuse a reducer that keeps fewer visual tokens than the operator allows.

    Raises:
        ReducerNotAllowed: Says how many it keeps.
    """
    if policy.min_keep_ratio is None:
        return
    least = spec.capabilities.least_keep_ratio
    if least is None or least < policy.min_keep_ratio:
        share = "an unknown share" if least is None else f"{least:g}"
        raise ReducerNotAllowed(
            f"{spec.canonical} keeps {share} of the visual tokens at worst; requests to this server may not go "
            f"below {policy.min_keep_ratio:g}"
        )

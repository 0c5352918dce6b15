"""Every error the project raises on purpose.

    MmError
    ├── RequestError            theirs: the request cannot be served as asked
    │   ├── InvalidRequest      a field is missing, wrong or not allowed
    │   │   └── ContextTooLong  the prompt does not fit the model
    │   ├── UnknownModel        no model of that name is served
    │   └── MediaError          an image or clip cannot be used
    ├── CapacityError           later: the same request may succeed in a while
    │   └── DeadlineExceeded    it took longer than it may
    ├── PluginError             at build, or when a request names a plugin
    │   ├── UnknownPlugin, MissingPackage
    │   ├── BrokenPlugin        it is registered, but cannot be imported or built
    │   ├── InvalidOption, IncompatiblePlugin
    │   ├── BadWeights          a learned reducer's weights are absent, damaged or of another checkpoint
    │   ├── ReducerNotAllowed   the operator does not let requests use it
    │   ├── ReducerFault        a reducer failed, or returned what cannot be applied; ReducerOff: again and again
    │   ├── DrafterFault        a drafter failed, or proposed what cannot be verified; DrafterOff: again and again
    │   └── PluginFault         an encoder or a family failed
    └── EngineError             ours
        └── SchemaNotFulfilled  the model's answer is not of the form that was asked for

Errors cross process borders: each keeps its facts as arguments and formats them when read. `serve.api` knows statuses.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

MAX_SHOWN_CHARS, MAX_OWNER_CHARS = 60, 300  # an owner may be the path of a settings file
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = MAX_SHOWN_CHARS


def shown(value: object) -> str:
    """A value for an error message, cut to a length that can be read. A huge value is cut before it is written out."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


class MmError(Exception):
    """Base of every error raised on purpose."""

    code = "error"


class RequestError(MmError):
    """The request cannot be served as asked; asking again unchanged fails again."""

    code = "invalid_request"


class InvalidRequest(RequestError):
    """A request field is missing, malformed or not allowed.

    Args:
        message: What was given, what is allowed, what to do.
        param: The field's path in the request, such as `messages[0].content[1]`.
        code: Machine-readable reason.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message, param, code)
        self.message, self.param, self.code = message, param, code

    def __str__(self) -> str:
        return self.message


class ContextTooLong(InvalidRequest):
    """Prompt and requested output together exceed the model's positions."""

    def __init__(self, num_prompt_tokens: int | str, max_new_tokens: int, max_context_tokens: int) -> None:
        asked = f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} were asked for"
        advice = "shorten the prompt, send fewer media, or lower max_tokens"
        message = f"{asked}, but this model's context holds {max_context_tokens}; {advice}"
        super().__init__(message, "messages", "context_length_exceeded")
        self.args = (num_prompt_tokens, max_new_tokens, max_context_tokens)


class UnknownModel(RequestError):
    """No model of that name is served here."""

    code = "model_not_found"

    def __init__(self, name: str, available: Sequence[str]) -> None:
        super().__init__(name, tuple(available))
        self.name, self.available, self.param = name, tuple(available), "model"

    def __str__(self) -> str:
        return f"the model {shown(self.name)} does not exist here; available: {', '.join(self.available)}"


MEDIA_REASONS: dict[str, str] = {
    "empty": "the {kind} is empty",
    "no_video": "the file holds no video: no moving pictures, only sound or a cover",
    "undecodable": "the {kind} cannot be decoded: it is damaged, truncated or no {kind} file",
    "unsupported_format": "the {kind}'s format is not allowed; send {allowed}",
    "too_many_bytes": "the {kind} is larger than the limit of {limit} bytes",
    "too_many_pixels": "the {kind} has more pixels than the limit of {limit}",
    "too_much_memory": "to decode the {kind} takes more memory than the limit of {limit} bytes for a request",
    "too_small": "the {kind} is smaller than {limit} pixels on one side",
    "bad_aspect": "the {kind} is more than {limit} times longer on one side than on the other",
    "too_many_frames": "the video has or asks for more frames than the limit of {limit}",
    "too_long": "the video is longer than the limit of {limit} seconds",
    "too_many_items": "the request carries more {kind}s than the limit of {limit}",
    "decode_limit": "the {kind} took more time or memory to decode than allowed",
    "bad_source": "the {kind}'s source cannot be understood: send a data: URL",
    "bad_data_url": "the {kind}'s data: URL {allowed}",
    "remote_disabled": "remote URLs are off on this server: send the {kind} as a data: URL",
    "domain_not_allowed": "the {kind}'s address is not on this server's list of allowed domains",
    "fetch_failed": "the {kind} could not be fetched from its address",
    "file_not_found": "the {kind} file does not exist or cannot be read",
    "not_supported": "this model does not take {kind} input",
    "bad_shape": "this model's processor takes no {kind} of {allowed}",
}


class MediaError(RequestError):
    """An image or clip cannot be used.

    The text is fixed per reason and never carries a library's message, which may hold addresses or paths.

    Args:
        reason: A key of `MEDIA_REASONS`.
        kind: "image" or "video".
        limit: The limit that was exceeded, if the reason has one.
        allowed: What would be accepted, or what is wrong, if the reason names it.
        param: The field's path in the request, once known.
    """

    def __init__(
        self, reason: str, kind: str = "image", limit: float | None = None, allowed: str = "", param: str | None = None
    ) -> None:
        super().__init__(reason, kind, limit, allowed, param)
        self.reason, self.kind, self.limit, self.allowed, self.param = reason, kind, limit, allowed, param
        self.code = f"media_{reason}"

    def at(self, param: str) -> MediaError:
        """The same error, naming the request field it came from."""
        return MediaError(self.reason, self.kind, self.limit, self.allowed, param)

    def __str__(self) -> str:
        limit = f"{self.limit:g}" if isinstance(self.limit, float) else self.limit
        return MEDIA_REASONS[self.reason].format(kind=self.kind, limit=limit, allowed=self.allowed)


class CapacityError(MmError):
    """There is no room now; the same request may succeed after `retry_after_s`."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.message, self.retry_after_s = message, retry_after_s

    def __str__(self) -> str:
        return self.message


class DeadlineExceeded(CapacityError):
    """The answer took longer than the request or the server allows."""

    code = "timeout"


class PluginError(MmError):
    """A plugin cannot be found, built or used with this model."""

    code = "invalid_plugin"


def nearest(name: str, available: Sequence[str]) -> str:
    """A `; did you mean ...?` clause, or nothing when no name is close."""
    close = difflib.get_close_matches(name, available, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class UnknownPlugin(PluginError):
    """No plugin of that kind has that name."""

    code = "unknown_plugin"

    def __init__(self, kind: str, name: str, available: Sequence[str]) -> None:
        super().__init__(kind, name, tuple(available))
        self.kind, self.name, self.available = kind, name, tuple(available)

    def __str__(self) -> str:
        known, hint = ", ".join(self.available) or "none installed", nearest(self.name, self.available)
        return f"no {self.kind} named {shown(self.name)}{hint} (available: {known})"


class MissingPackage(PluginError):
    """A plugin is registered, but a package that it imports is not installed."""

    code = "missing_package"

    def __init__(self, kind: str, name: str, package: str) -> None:
        super().__init__(kind, name, package)
        self.kind, self.name, self.package = kind, name, package

    def __str__(self) -> str:
        advice = "pip install 'mm-serving[all]' brings what ours need"
        return f"the {self.kind} {self.name!r} needs the package {self.package!r}, which is not installed; {advice}"


class BrokenPlugin(PluginError):
    """A plugin is registered, but it cannot be imported or built. Only who names it meets this error.

    Args:
        reason: What is wrong, fit for callers of a server.
        detail: The text of the plugin's own exception, which may hold paths; for the operator.
    """

    code = "broken_plugin"

    def __init__(self, kind: str, name: str, reason: str, detail: str = "") -> None:
        super().__init__(kind, name, reason, detail)
        self.kind, self.name, self.reason, self.detail = kind, name, reason, detail

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r} cannot be used: {self.reason}"


class InvalidOption(PluginError):
    """A plugin was given an option it does not have, or a value it cannot take."""

    code = "invalid_plugin_option"

    def __init__(self, owner: str, option: str, message: str) -> None:
        super().__init__(owner, option, message)
        self.owner, self.option, self.message = owner, option, message

    def __str__(self) -> str:
        return f"{self.owner[:MAX_OWNER_CHARS]}: option {shown(self.option)} {self.message}"


class IncompatiblePlugin(PluginError):
    """A plugin needs what this encoder or model family does not supply."""

    code = "incompatible_plugin"

    def __init__(self, plugin: str, host: str, missing: Sequence[str]) -> None:
        super().__init__(plugin, host, tuple(missing))
        self.plugin, self.host, self.missing = plugin, host, tuple(missing)

    def __str__(self) -> str:
        clip = " (a LLaVA does with the CLIP of its tower as its folder `clip`)" if "clip_text" in self.missing else ""
        return f"{self.plugin} cannot be used with {self.host}, which does not supply: {', '.join(self.missing)}{clip}"


class BadWeights(PluginError):
    """The weights of a learned reducer cannot be used with this model. Only who names the reducer meets this error.

    Args:
        weights: As the text named them.
        reason: What is wrong and what to do, fit for callers of a server.
        detail: Where they lie, for the operator.
    """

    code = "bad_weights"

    def __init__(self, reducer: str, weights: str, reason: str, detail: str = "") -> None:
        super().__init__(reducer, weights, reason, detail)
        self.reducer, self.weights, self.reason, self.detail = reducer, weights, reason, detail

    def __str__(self) -> str:
        return f"the weights {self.weights!r} of the reducer {self.reducer!r} {self.reason}"


class ReducerNotAllowed(PluginError):
    """A request names a reducer, or asks it to keep fewer tokens, than the operator allows."""

    code = "reducer_not_allowed"


class ReducerFault(PluginError):
    """A reducer returned a decision that cannot be applied: a fault of the plugin, not of the request."""

    code = "reducer_fault"

    def __init__(self, reducer: str, message: str) -> None:
        super().__init__(reducer, message)
        self.reducer, self.message = reducer, message

    def __str__(self) -> str:
        return f"{self.reducer}: {self.message}"


class DrafterFault(PluginError):
    """A drafter failed, proposed what cannot be verified, or took too long (`is_over`). An answer loses its drafts."""

    code = "drafter_fault"

    def __init__(self, drafter: str, message: str, is_over: bool = False) -> None:
        super().__init__(drafter, message, is_over)
        self.drafter, self.message, self.is_over = drafter, message, is_over

    def __str__(self) -> str:
        return f"{self.drafter or 'a drafter'}: {self.message}"


OFF = "is switched off for {} s more, since it failed again and again; the last time it {}; use another one meanwhile"


class ReducerOff(ReducerFault):
    """A reducer failed again and again; `reason` is the last fault. It is tried again after `retry_after_s`."""

    code = "reducer_off"

    def __init__(self, reducer: str, reason: str, retry_after_s: int) -> None:
        super().__init__(reducer, OFF.format(retry_after_s, reason))
        self.args, self.retry_after_s = (reducer, reason, retry_after_s), retry_after_s


class DrafterOff(DrafterFault):
    """As `ReducerOff`, of a drafter."""

    code = "drafter_off"

    def __init__(self, drafter: str, reason: str, retry_after_s: int) -> None:
        super().__init__(drafter, OFF.format(retry_after_s, reason))
        self.args, self.retry_after_s = (drafter, reason, retry_after_s), retry_after_s


class PluginFault(PluginError):
    """An encoder or a family (`kind`) failed or took too long: not the request's fault."""

    code = "plugin_fault"

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(kind, name, message)
        self.kind, self.name, self.message = kind, name, message

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}: {self.message}"


class EngineError(MmError):
    """A fault of ours; the request may be right."""

    code = "internal_error"


class SchemaNotFulfilled(EngineError):
    """The model's answer breaks a rule of the request's JSON schema that could not be enforced token by token."""

    code = "schema_not_fulfilled"

"""Content keys. Every part is framed with its type and length, so no two different lists of parts share a byte string."""

from __future__ import annotations

from blake3 import blake3


def framed_hash(*parts: str | bytes | int | float | None) -> str:
    """BLAKE3-256 over the parts, hexadecimal."""
    digest = blake3()
    for part in parts:
        raw = part if isinstance(part, bytes) else repr(part).encode() if not isinstance(part, str) else part.encode()
        digest.update(f"{type(part).__name__}:{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()

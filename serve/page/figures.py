"""Numbers as the page writes them: short, for columns."""

from __future__ import annotations


def milliseconds(seconds: float) -> str:
    """0 ms, 0.4 ms, 38 ms, 1,240 ms."""
    value = seconds * 1000
    if not value:
        return "0 ms"
    return f"{value:.1f} ms" if abs(value) < 9.95 else f"{value:,.0f} ms"


def kibibytes(num_bytes: int) -> str:
    """0 KiB, 96 KiB, 12.5 MiB."""
    size = abs(num_bytes)
    if size < 2**20:
        return f"{num_bytes / 2**10:,.0f} KiB"
    return f"{num_bytes / 2**20:,.1f} MiB" if size < 2**30 else f"{num_bytes / 2**30:,.2f} GiB"


def percent_less(before: float, after: float) -> str:
    """75%, or -3% where it is more."""
    return f"{(before - after) / before:.0%}".replace("-", "−")


def signed_saving(before_s: float, after_s: float) -> str:
    """12 ms, or −3.0 ms where it took longer."""
    return milliseconds(before_s - after_s).replace("-", "−")

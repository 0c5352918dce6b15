"""Which hidden states a tower is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.utils import output_capturing

SELECTS = hasattr(output_capturing, "resolve_hidden_states_indices")
"""Whether transformers takes indices into all hidden states, the tower's input first. Before 5.20 a list names layers
instead, and the input is left out, so that the same index means another state."""


def wanted_states(indices: Sequence[int]) -> list[int] | bool:
    """The value of `output_hidden_states` with which `hidden_states[i]` holds state i, for every i of `indices`."""
    return list(indices) if SELECTS else True

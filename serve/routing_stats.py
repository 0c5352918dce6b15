"""What routing decided; light to import, since `mm plan` uses the same routing as the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RoutingStats:
    """What one ingress decided for one stage.

    Attributes:
        num_decisions: Requests that were routed by content.
        num_hits: Those that went to their home encoder, or to a decoder that held some of the prompt.
        num_spills: Those that an encoder's load kept from their home.
        num_changed: Those that would have gone elsewhere by load alone.
        num_shared: Requests whose media were shared out to several encoders, each part of which is a decision.
    """

    num_decisions: int = 0
    num_hits: int = 0
    num_spills: int = 0
    num_changed: int = 0
    num_shared: int = 0

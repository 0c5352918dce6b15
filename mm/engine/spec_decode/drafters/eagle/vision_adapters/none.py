"""No visual rows: text rows carry what the target saw.

Paper     HiViS, arXiv:2509.23928.
Reads     Nothing but features of text rows: the target's state on the last visual row is that of the first text row.
Cost      Nothing: neither prefill nor cache grow with the visual tokens.
Differs   Text rows keep the positions they have beside the visual ones; the paper's are compact.
"""

from __future__ import annotations

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import SeenRows, VisionAdapter, VisualContext


class Unseen(VisionAdapter):
    """Visual rows are hidden from the drafter."""

    def look(self, sight: VisualContext) -> SeenRows:
        return self.no_rows(sight)

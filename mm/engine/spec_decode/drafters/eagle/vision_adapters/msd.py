"""MSD: every visual token is a draft row of its own, decoupled from the text rows.

Paper     arXiv:2505.14260, section 3 (text rows are fused from token and feature, visual rows are embeddings alone).
Reads     Visual embeddings as encoder and reducer left them; no features, so rows dropped inside the decoder stay seen.
Cost      One key and value per visual token.
Differs   from the paper: nothing known. Each row stands one position before its token, as all draft rows do.
"""

from __future__ import annotations

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import SeenRows, VisionAdapter, VisualContext


class EveryRow(VisionAdapter):
    """Visual embeddings enter the draft layer as they are."""

    def look(self, sight: VisualContext) -> SeenRows:
        return SeenRows(inputs=sight.embeddings, positions=sight.positions - 1)

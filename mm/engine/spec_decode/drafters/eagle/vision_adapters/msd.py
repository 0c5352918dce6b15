"""MSD: every visual token is an input of the draft layer, apart from the text.

Paper     arXiv:2505.14260, section 3 (text inputs are fused from token and feature, visual inputs are embeddings).
Reads     Visual embeddings after encoder and reducer, and no features. Tokens dropped inside the decoder stay in.
Cost      One key and value per visual token.
Differs   from the paper: nothing known. Each input stands one position before its token, as all draft inputs do.
"""

from __future__ import annotations

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import AdapterOutput, VisionAdapter, VisualContext


class AllVisualTokens(VisionAdapter):
    """Visual embeddings enter the draft layer unchanged."""

    def compress(self, context: VisualContext) -> AdapterOutput:
        return AdapterOutput(inputs=context.embeddings, positions=context.positions - 1)

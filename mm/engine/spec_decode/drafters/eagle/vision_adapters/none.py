"""No visual inputs: the features of text carry what the target saw.

Paper     HiViS, arXiv:2509.23928.
Reads     Features of text alone: the target's state on the last visual token is the feature of the first text token.
Cost      None: neither prefill nor cache grow with the visual tokens.
Differs   Text keeps the positions that it has beside the visual tokens; the paper's are compact.
"""

from __future__ import annotations

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import AdapterOutput, VisionAdapter, VisualContext


class NoVisualTokens(VisionAdapter):
    """The draft layer gets no visual tokens."""

    def compress(self, context: VisualContext) -> AdapterOutput:
        return self.no_tokens(context)

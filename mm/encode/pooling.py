"""One vector for a request's media."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.data.tokens import EncodedMedia
from mm.errors import InvalidRequest


def mean_embedding(media: EncodedMedia) -> Tensor:
    """(D,) float32 on the CPU: the mean of all kept tokens of all items, each token counted once.

    Raises:
        InvalidRequest: There are no media.
    """
    if not media.items:
        raise InvalidRequest("an embedding needs an image or a video; send at least one", "messages")
    return torch.cat([item.tokens.embeddings for item in media.items]).float().mean(dim=0).cpu()

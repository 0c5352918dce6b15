"""Names of the auxiliary features that an encoder may supply and a reducer may need."""

from __future__ import annotations

CLS_ATTENTION = "cls_attention"
"""Auxiliary feature, (H, N) float32: how much [CLS] attends to each token in the block that the features come from."""


ATTENTION_RECEIVED = "attention_received"
"""Auxiliary feature, (H, N) float32: the attention that each token receives in the block that the embeddings come from:
[CLS] attention where the tower has [CLS], else the mean over all tokens of the picture. A cell of several patches has
their mean."""


TOWER_KEYS = "tower_keys"
"""Auxiliary feature, (head width, N) float32: each token's key in that block, before rotation, averaged over heads."""


TOWER_FEATURES = "tower_features"
"""Auxiliary feature, (tower width, N) float32: each token as the tower leaves it, before the projector."""


CLIP_EMBEDDINGS = "clip_embeddings"
"""Auxiliary feature, (P, N) float32: each token in the space that CLIP has for pictures and texts. Of checkpoints whose
folder has that CLIP as `clip`."""


CLIP_TEXT = "clip_text"
"""Not per token, and of the question in that space: see `ReduceContext.clip_text` and `ReadsClipText`."""


BLOCK_KEYS = "block_keys"
"""Not a feature of tokens: an encoder that provides it hosts a reducer of the stage IN_VIT, see `InTower`."""


RESOLUTION = "resolution"
"""Not a feature of tokens: an encoder that provides it hosts a reducer of the stage PIXELS, see `ChangesResolution`."""


PATCHES = "patches"
"""Not a feature of tokens: an encoder that provides it hosts a reducer of the stage BEFORE_VIT, see `BeforeTower`."""


TEXT_EMBEDDINGS = "text_embeddings"
"""Not per token, and of the question: see `ReduceContext.text_embeddings` and `ReadsText`."""

"""Attention backends over the block cache."""

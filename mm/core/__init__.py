"""Vocabulary: plain data, errors, limits, plugin protocols and the registry."""

"""Sampling: from logits to tokens, and from tokens to text."""

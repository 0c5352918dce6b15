"""Reducers that act inside the vision tower, between attention and MLP of its blocks."""

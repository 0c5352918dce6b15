"""Reducers that act after the projector and before the decoder."""

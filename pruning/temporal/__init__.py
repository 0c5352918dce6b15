"""Reducers that act on the frames of a clip, after the projector and before the decoder."""

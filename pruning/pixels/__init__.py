"""Reducers that ask the checkpoint for fewer tokens."""

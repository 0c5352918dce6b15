"""Reducers before the vision tower: some patches never enter it."""

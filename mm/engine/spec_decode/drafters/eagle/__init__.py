"""Trained drafters: their inputs, the network, the draft layer with its cache, and draft trees."""

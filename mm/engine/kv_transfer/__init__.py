"""Sequences that begin at one engine and go on at another: keys, values and everything else that they need."""

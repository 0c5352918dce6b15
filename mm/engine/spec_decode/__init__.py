"""Speculative decoding: propose, verify, observe."""

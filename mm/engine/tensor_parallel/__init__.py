"""Tensor parallel: one engine whose decoder is spread over several processes."""

"""The paged KV cache, and the prefix cache on top of it."""

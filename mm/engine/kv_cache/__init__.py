"""Keys and values in blocks, and prefixes that requests share."""

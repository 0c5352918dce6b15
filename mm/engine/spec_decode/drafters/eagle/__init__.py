"""What trained drafters are made of: rows, the layer with its cache, trees, and guessing."""

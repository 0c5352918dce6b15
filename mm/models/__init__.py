"""One file per model family: weights, prompt template, positions, splice."""

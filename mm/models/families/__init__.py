"""One file per special model family."""

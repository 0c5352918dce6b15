"""Plain data that travels between the stages."""

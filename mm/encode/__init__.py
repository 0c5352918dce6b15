"""The encoder's half of a request."""

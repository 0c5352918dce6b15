"""`mm compare`."""

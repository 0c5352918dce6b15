"""From visual tokens and messages to text."""

"""Protocols of the plugins, their registry and their text form."""

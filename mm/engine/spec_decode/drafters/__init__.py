"""Drafters that come with the engine, one file each; see `mm.plugins.drafter` for what they promise."""

"""Drafters that come with the engine, one file each; see `mm.core.drafting` for what they promise."""

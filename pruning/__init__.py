"""Visual tokens to fewer visual tokens."""

"""Vision towers, one file each."""

"""Tower width to decoder width, one file each."""

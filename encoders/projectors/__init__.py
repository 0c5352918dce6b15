"""Tower width to decoder width, one file each.

Empty so far: the LLaVA tower uses transformers' own projector class, since a copy could only drift away from bit equality.
A projector that transformers does not have gets a file here.
"""

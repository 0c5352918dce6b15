"""Tower width to decoder width, one file each.

Empty so far: the LLaVA tower uses the projector class of transformers, since a copy could only drift from bit equality.
A projector that transformers does not have gets a file here.
"""

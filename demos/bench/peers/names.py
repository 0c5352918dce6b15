"""Names of llama.cpp's files, which both its own environment and ours know."""

DECODER, TOWER, PROMPT = "decoder.gguf", "tower.gguf", "prompt.txt"
PICTURE, QUESTION = "{picture}", "{question}"
"""Where they stand in the prompt. llama.cpp puts the tokens around a picture there itself."""

"""How many GPUs should encode, prefill and decode: service curves, traffic, a simulation of the server, and plans.

Nothing here imports torch or Ray, except `calibrate`, which measures the curves.
"""

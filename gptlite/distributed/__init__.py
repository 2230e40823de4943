"""Several processes that train together, started by torchrun.

Ranks, what they add up, and who of them still lives; the core knows them as a World.
"""

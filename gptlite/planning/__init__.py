"""What a run would do before it does it: what `auto` means, memory, time, the dropout plan.

It measures and decides; it trains nothing that is kept.
"""

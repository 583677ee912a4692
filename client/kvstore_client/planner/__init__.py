"""Fetch or recompute: per chunk, by measured speeds and a deadline. Pure: no I/O, no clock.

`estimates` (what was measured), `costs` (what recomputing takes), `sizes` (bytes by quality), `choose` (the choice),
`plan` (the choice explained), `controller` (the choice thought over as chunks come).
"""

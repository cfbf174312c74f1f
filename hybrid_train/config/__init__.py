"""How a run is composed, checked as a whole and frozen. Needs no torch.

Not here: the sections themselves (`schema`), how they become objects (`jobs/networks.py`).
"""

"""What a run is: typed sections, how they are composed and checked. Needs no torch.

Not here: how a section becomes an object (`jobs/assemble.py`).
"""

"""One dataclass file per section of a run, and the little languages of their values; data only.

Not here: rules that join sections (`config/checks.py`).
"""

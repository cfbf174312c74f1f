"""One dataclass file per section of a run; data only, each with its own limits in `problems`.

Not here: rules that join sections (`config/checks.py`).
"""

"""One dataclass file per section of a run, and the little languages of their values; data only.

Not here: rules that join sections (`config/checks.py` and its `rules_of_*.py`), and the values that
a run begins with (`conf/`).
"""

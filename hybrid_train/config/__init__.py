"""How a run is composed, checked as a whole and frozen; the tables of commands and of versions.

Nothing here needs torch. Not here: the sections themselves (`schema`), how they become objects
(`jobs/networks.py`), and the commands at work (`jobs`).
"""

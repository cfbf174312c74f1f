"""Whether a machine is fit to train: its libraries, devices, limits, cluster, and their speed.

Not here: how it is printed (`jobs/doctor.py`), what a run may ask of a GPU (`precision/te.py`).
"""

"""Who talks to whom: degrees, rank coordinates, process groups.

Not here: how a model is cut (`model`).
"""

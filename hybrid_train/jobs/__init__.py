"""Entry points of the command line, and the wiring of each.

Not here: anything that could be used by two jobs.
"""

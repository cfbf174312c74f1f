"""What is measured and who is told: metrics, console, files, trackers.

Not here: when it is measured (`training/hooks`).
"""

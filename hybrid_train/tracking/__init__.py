"""What is measured and who is told: metrics, console, files, trackers; how attempts at a run ended.

Not here: when it is measured (`training/hooks`), the pages that show it (`jobs/report.py`,
`jobs/status.py`).
"""

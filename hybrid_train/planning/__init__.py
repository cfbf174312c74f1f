"""What a run will need before it starts: degrees, phases, pipeline stages, memory. Needs no torch.

Not here: what a model is made of (`anatomy`), and what a job may not ask for (`config/checks.py`).
"""

"""How good a model is: questions of tasks, what they score, and how sure that is.

Not here: log-probabilities and text of a model (`generation`), settings (`schema/evaluation.py`),
the command (`jobs/evaluate.py`).
"""

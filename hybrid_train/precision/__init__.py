"""Number formats and what a recipe means for Megatron.

Not here: which layers a model has (`model`).
"""

"""Save, find, load, check and delete checkpoints; read and write their tensors without a model.

Not here: when to save and when to go back (`training/hooks/checkpointing.py`), the calls into
Megatron (`megatron/checkpoints.py`), Hugging Face folders (`hf`).
"""

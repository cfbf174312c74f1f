"""Checkpoints of NVIDIA's trainers, Megatron-LM, Megatron-Bridge and NeMo 2: read and written.

Not here: Megatron-Core itself (`megatron`), how a checkpoint lies on disk
(`checkpoint/tensor_files.py`), Hugging Face folders (`hf`), the command (`jobs/convert.py`).
"""

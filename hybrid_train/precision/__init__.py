"""Number formats: schemes, quantizers, emulated GEMMs, what GPUs compute, and what really ran.

Not here: which format each layer gets (`anatomy/gemm_formats.py`), which layers of a built model
are quantized (`model/quantized.py`), what is said of it in a run (`training/hooks/rounding.py`).
"""

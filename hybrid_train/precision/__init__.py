"""Number formats: quantizers, recipes, emulated GEMMs, what hardware has, and what really ran.

Not here: which layers a model has (`model`), which format each gets (`anatomy.gemm_formats`).
"""

"""What a model is made of: kinds of layers, parameters, sizes, from the config alone; no torch.

Not here: how it is split over processes (`planning`), and how it is built (`model/build.py`).
"""

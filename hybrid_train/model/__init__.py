"""The hybrid model of a job: built and initialised (`build.py`), changed by edits, observed.

Not here: the classes that it is made of (`megatron`), which edits a job asks for
(`jobs/networks.py`), losses and steps (`training`).
"""

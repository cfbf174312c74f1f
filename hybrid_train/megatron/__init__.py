"""The wall around Megatron-Core: nothing else imports it.

Here are our classes that its specs name, its process groups, data parallelism, schedules,
optimizers and checkpoint calls; the table of what our code was written for and what it replaces
(`written_for.py`), and what puts the replacements in place (`patches.py`).

Not here: how a model is built and changed (`model`), what is trained (`training`), what a
checkpoint holds and means (`checkpoint`), how a row of the table is checked
(`runtime/replacements.py`).
"""

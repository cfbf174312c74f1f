"""The wall around Megatron-Core: nothing else imports it.

Our classes that its specs name, its process groups, data parallelism, schedules, optimizers and
checkpoint calls; and `replacements`, the checked table of what is put in its place.

Not here: how a model of ours is built and changed (`model`), what is trained (`training`), what a
checkpoint means (`checkpoint`).
"""

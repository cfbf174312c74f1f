"""Entry points of the command line, and the wiring of each.

What several jobs share is here, too: tables and help pages (`help.py`), the folder of a run
(`run_folder.py`), what it tells of the run (`run_state.py`), networks (`networks.py`).

Not here: the loop and its hooks (`training`), what the command line means (`config`), any work
that a program without a command line could want.
"""

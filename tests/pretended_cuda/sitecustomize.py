"""Gives the pretended device to the processes that a test starts by multiprocessing's spawn.

Python reads this file as it starts, since `run.py` puts this folder on the path.
"""

import atexit
import sys

if "--multiprocessing-fork" in sys.orig_argv:
    import plugin

    atexit.register(plugin.pytest_unconfigure)

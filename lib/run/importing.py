"""Importing large packages without the collector, which would go through what they leave behind again and again."""

import contextlib
import gc


@contextlib.contextmanager
def importing():
    """For a body that imports what stays: a quarter quicker. The collector does not look at it later either, nor in
    forked children (3 % of a laptop member's time, and copies of what all of them share)."""
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()

"""A process that ends when the one that started it has, where nobody else would end it.

Apart from lib/run/child.py, because members depend on it and are trained again when it changes.
"""

import os
import signal
import threading
import time


def end_with_parent() -> None:
    """End this process and its group when its parent is gone, which no pipe tells: a Ray worker, or torchrun."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()

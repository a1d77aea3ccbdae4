"""The thread of life between a core's process and its parent, seen from the child: it never outlives the parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

ORPHAN_GRACE_S = 2.0
PR_SET_PDEATHSIG = 1


def hold_on_to_parent(parent_pid: int, stop: Callable[[], None]) -> None:
    """End with the parent: Linux sends SIGKILL when its thread ends; everywhere the end of stdin calls `stop` first."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)  # it ended before the call
    threading.Thread(target=watch_stdin, args=(stop,), daemon=True).start()


def watch_stdin(stop: Callable[[], None]) -> None:
    """End when stdin ends: orderly if the loop is turning, at once if it is not."""
    while os.read(0, 4096):
        pass
    stop()
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


def leave_stdout_alone() -> None:
    """stdout belongs to the parent's program: what anything here prints goes to stderr."""
    os.dup2(2, 1)

"""Python stack of the main thread, and whether it waits for other ranks or for the device."""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

FRAMES = 12  # innermost frames of a report
COMMUNICATION = "torch/distributed/"
# Calls that wait for a collective or for the device; those of threading wait for this process.
WAITING = re.compile(r"\.(wait|item|tolist|cpu|numpy|synchronize)\(|\bbarrier\(")
LOCAL_WAITS = ("threading.py", "queue.py", "concurrent/futures/", "multiprocessing/", "subprocess.py", "selectors.py")


@dataclass(frozen=True)
class Stack:
    """Represent the stack of the main thread."""

    place: str  # innermost frame: path:line function
    is_waiting: bool  # for other ranks or the device
    text: str  # innermost frames, the outermost of them first


def main_stack() -> Stack:
    """Return the stack of the main thread, from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return Stack("no Python frame", False, "")
    path, code = short_path(frame.f_code.co_filename), frame.f_code
    text = "".join(traceback.format_list(traceback.extract_stack(frame)[-FRAMES:])).rstrip()
    return Stack(f"{path}:{frame.f_lineno} {code.co_name}", _waits(frame), text)


def _waits(frame: FrameType) -> bool:
    path = frame.f_code.co_filename.replace("\\", "/")
    if COMMUNICATION in path:
        return True
    if any(local in path for local in LOCAL_WAITS):
        return False
    return WAITING.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)) is not None


def short_path(path: str) -> str:
    """Return a path from its package on: at most the last three parts."""
    return "/".join(PurePath(path).parts[-3:])

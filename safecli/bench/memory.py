"""The most memory that a process has held, from a moment on."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def restart_peak() -> int:
    """Let the peak start again from here where the system can (Linux); the bytes that are resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most bytes that were resident since `restart_peak`, or since the process began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

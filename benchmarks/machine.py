"""What the machine is, and how much of its memory this process has taken."""

import os
import resource
import sys
from pathlib import Path


def processor_name() -> str:
    """The processor's name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def peak_resident_bytes() -> int:
    """The most memory that this process has held, loaded libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""What the machine is, and how much of its memory this process has taken."""

import contextlib
import os
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed; one run from its source tree is not."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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


def jax_device_name() -> str:
    """The name of JAX's default device."""
    device = jax.devices()[0]
    return processor_name() if device.platform == "cpu" else device.device_kind


def jax_peak_bytes() -> int:
    """The most memory that JAX has held on one of its devices, or the process where these do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", 0) for each in stats) or peak_resident_bytes()

"""How a process that computes is set up: allocator, threads, and what a device needs for the same bits each time."""

from __future__ import annotations

import os

import torch

WORKER_ENVIRONMENT = {
    # The C allocator keeps what was freed (mallopt(3)). With texts of all lengths it would give memory back to the
    # kernel and ask for it again, page by page: half of the page faults, and up to a fifth of a step where they cost
    # much. Huge pages (GLIBC_TUNABLES) fault less still, but a step that needs new ones may stall for seconds.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
    # Else each worker warns at every start that `find_unused_parameters` finds none: it is on for another reason.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment variables that a worker's process must be started with."""


def set_up_torch(cpus: int, device: torch.device) -> None:
    """Threads, and what must be set before a device's first sum."""
    # Adam's moments of words that are long unseen fade into denormal numbers, each of which takes a hundred times as
    # long. Set before the first parallel loop, since its threads take the setting over from this one.
    torch.set_flush_denormal(True)
    torch.set_num_threads(cpus)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # what graphs and NCCL take where no device is named
        # cuBLAS gives the same result each time with it, and reads it at its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compute_on(gpu: bool, cpus: int | None = None) -> torch.device:
    """The device of a process that computes alone, set up.

    Args:
        gpu: take one, if there is one.
        cpus: threads; None leaves torch's own number.
    """
    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    set_up_torch(cpus or torch.get_num_threads(), device)
    return device

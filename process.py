"""Prepare a process for training: device, memory, signals, its place among others."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

import torch

from settings import check


def prepare_process(device: str = "cpu", threads: int | None = None) -> torch.device:
    """Set up this process for fast training; for a script to call once, before any tensor.

    Flushes denormal numbers to zero: the gradients of a model that reaches zero training loss
    are full of them, and the CPU multiplies them many times slower. Keeps freed memory: glibc
    would return the gradients' memory to the system after each step and fetch it anew, page by
    page, in the next, at the cost of the products themselves.

    Args:
        device: "auto", a GPU where there is one, "cpu" or "cuda"; under torchrun each process
            of a machine takes a GPU of its own.
        threads: for PyTorch's operators; None leaves its default, the number of cores.

    Raises:
        SettingError: the device is not there.
    """
    on_gpu = torch.cuda.is_available()
    check(device != "cuda" or on_gpu, "device", device, "not on this machine, which has cpu")
    torch.set_flush_denormal(True)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cpu" or not on_gpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def exit_on_signals() -> None:
    """End by SystemExit, with everything closed on the way, on Ctrl-C and on SIGTERM.

    The exit status is 128 + the signal's number. While things are being closed a further SIGTERM
    is ignored, and a further Ctrl-C ends the process at once.
    """

    def leave(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        print(f"\nstopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


class Ranks:
    """The processes that torchrun started, which share out work; a single one without it.

    They meet at torchrun's key-value store, and need no process group: whoever is free takes
    the next piece, and nobody waits for anybody but at the end. After torchrun restarts them
    they count anew, so a piece that is done has to be known by other means.
    """

    def __init__(self) -> None:
        self._store, self.rank, self.world_size = None, 0, 1
        if "RANK" in os.environ:
            rendezvous = torch.distributed.rendezvous("env://")
            self._store, self.rank, self.world_size = next(rendezvous)
        self._taken = 0

    def take(self) -> int:
        """Return the number of the next piece of work, counted from 0 over all processes."""
        self._taken += 1
        return (self._store.add("taken", 1) if self._store else self._taken) - 1

    def finish(self) -> None:
        """Say that this process has no more work."""
        if self._store:
            self._store.add("finished", 1)

    def all_finished(self) -> bool:
        """Whether every process has said so."""
        return self._store is None or self._store.add("finished", 0) == self.world_size

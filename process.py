"""Prepare a process for training: device, memory, signals, its place among others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from settings import check

LOST_SECONDS = 60.0  # after which a process that shows no life is taken to be lost


def prepare_process(device: str) -> torch.device:
    """Set up this process for fast training; for a script to call once, before any tensor.

    Flushes denormal numbers to zero: the gradients of a model that reaches zero training loss
    are full of them, and the CPU multiplies them many times slower. Keeps freed memory: glibc
    would return the gradients' memory to the system after each step and fetch it anew, page by
    page, in the next, at the cost of the products themselves.

    Args:
        device: "auto", a GPU where there is one, "cpu" or "cuda"; under torchrun each process
            of a machine takes a GPU of its own.

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
    the next piece, and nobody waits for anybody but rank 0 at the end. After torchrun restarts
    them they count anew, so a piece that is done has to be known by other means.
    """

    def __init__(self) -> None:
        self._store, self.rank, self.world_size = None, 0, 1
        if "RANK" in os.environ:
            rendezvous = torch.distributed.rendezvous("env://")
            self._store, self.rank, self.world_size = next(rendezvous)
            threading.Thread(target=self._show_life, daemon=True).start()

    def _show_life(self) -> None:
        # Without the store the work itself fails, and says so.
        with contextlib.suppress(torch.distributed.DistError):
            while True:
                self._store.add(f"life {self.rank}", 1)
                time.sleep(LOST_SECONDS / 10)

    def share(self, pieces: int, save: Callable[[], object]) -> Iterator[int]:
        """Yield the numbers of this process's pieces of work, of so many.

        `save` is called when there are no more. Rank 0 then waits for the others and, if one was
        lost on the way, gets all pieces once more, to do those that are not done.
        """
        if self._store is None:
            yield from range(pieces)
            save()
            return
        while (piece := self._store.add("taken", 1) - 1) < pieces:
            yield piece
        save()
        self._store.add(f"finished {self.rank}", 1)
        if self.rank == 0 and self._wait_for_others():
            yield from range(pieces)
            save()

    def _wait_for_others(self) -> bool:
        """Wait until each has finished, or shown no life for a while: whether one is lost."""
        now = time.monotonic()
        lives = dict.fromkeys(range(self.world_size), (0, now))  # and since when so many
        while True:
            now = time.monotonic()
            for rank in list(lives):
                if self._store.add(f"finished {rank}", 0):
                    del lives[rank]
                elif (count := self._store.add(f"life {rank}", 0)) != lives[rank][0]:
                    lives[rank] = count, now
            if all(now - since > LOST_SECONDS for _, since in lives.values()):
                return bool(lives)
            time.sleep(0.2)

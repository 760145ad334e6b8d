"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines of a log


class _Lines:
    """A log file for tqdm, which redraws one line: every drawing becomes a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, unit: str, digits: int = 0, show: bool = True) -> tqdm:
    """Return a progress bar with the time left, counted in `unit`s with so many `digits`.

    Where standard error is no terminal, it prints a line every LINE_SECONDS, the first one
    after that time: short work prints nothing.
    """
    terminal = sys.stderr.isatty()
    line = {"file": _Lines(), "delay": LINE_SECONDS, "mininterval": LINE_SECONDS}
    return tqdm(
        total=total,
        disable=not show,
        leave=False,
        miniters=0,
        dynamic_ncols=terminal,
        bar_format=f"{{desc}}{{percentage:3.0f}}%{'|{bar}|' if terminal else ','} "
        f"{{n:.{digits}f}} of {{total}} {unit}s [{{elapsed}}<{{remaining}}{{postfix}}]",
        **({} if terminal else {**line, "maxinterval": LINE_SECONDS}),
    )

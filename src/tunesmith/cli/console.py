"""What the commands print, and the one place where the libraries below are told to be quiet.

Everything that may quote data or paths goes through :func:`plain`, never through rich's markup: a row with ``[red]`` in
it is shown as it is, and no escape sequence of a data file reaches the terminal.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.text import Text

from tunesmith.core.errors import DataError

__all__ = [
    "console",
    "is_first_process",
    "not_utf8",
    "plain",
    "print_beside",
    "print_error",
    "print_lines",
    "silence_libraries",
]


def is_first_process() -> bool:
    """Return whether this is the only process of a run or the one that speaks for all (torchrun sets ``RANK``)."""
    return os.environ.get("RANK", "0") == "0"


def console(*, stderr: bool = False) -> Console:
    """Return a console on the present stdout or stderr; silent in all but the first process of a run."""
    return Console(stderr=stderr, quiet=not is_first_process(), highlight=False, markup=False, emoji=False)


def plain(text: str) -> str:
    """Return ``text`` with every character that could move the cursor or colour the terminal shown as ``?``."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def not_utf8(error: UnicodeDecodeError) -> DataError:
    """Return the error for a stdin that is no text."""
    return DataError(f"stdin is not UTF-8 text (byte {error.start}). Convert it to UTF-8.")


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are: no markup, and no line broken in the middle of a path."""
    out = console()
    for line in lines:
        out.print(Text(plain(line)), soft_wrap=True)


_COLUMN = 36
"""The least width in which text can be read beside other text."""


def print_beside(texts: Mapping[str, str]) -> None:
    """Print texts with their headings beside one another; one below the other where the terminal is narrow or none."""
    from rich.table import Table

    out = console()
    if not out.is_terminal or out.width < _COLUMN * len(texts):
        print_lines(line for name, text in texts.items() for line in (f"{name}:", text, ""))
        return
    table = Table.grid(padding=(0, 4, 0, 0), expand=True)
    for _ in texts:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(plain(name), style="bold") for name in texts))
    table.add_row(*(Text(plain(text)) for text in texts.values()))
    out.print(table)


def print_error(message: str) -> None:
    """Print ``error: MESSAGE`` in red to stderr, in every process: the one that fails may not be the first."""
    rank = os.environ.get("RANK")
    start = "error: " if rank in (None, "0") else f"error (process {rank}): "
    Console(stderr=True).print(Text(start + plain(message), style="red"), soft_wrap=True)


class _PlainLines(logging.Handler):
    """Our own log messages as plain lines on stderr, above a live display where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process():
            # Looked up at each call: a live display puts itself in the place of sys.stderr.
            sys.stderr.write(plain(record.getMessage()) + "\n")


def silence_libraries() -> None:
    """Switch off the bars, notices and warnings of the libraries below, and show our own messages as lines.

    Call it at the start of a command that loads anything; the library itself never touches these switches.
    """
    import datasets
    import huggingface_hub.utils
    import transformers

    # What torchao and bitsandbytes say while they are imported, of kernels that are not here.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    ours = logging.getLogger("tunesmith")
    if not any(isinstance(handler, _PlainLines) for handler in ours.handlers):
        ours.addHandler(_PlainLines())
    ours.setLevel(logging.INFO)
    ours.propagate = False

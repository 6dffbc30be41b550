"""``tunesmith check-adapter``: what is wrong with an adapter folder, before someone serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.console import print_lines, silence_libraries
from tunesmith.core.errors import AdapterError

__all__ = ["command"]


def command(
    folder: Annotated[str, typer.Argument(help="Adapter folder or run.", show_default=False)],
) -> None:
    """Check keys, shapes and values of an adapter against its base, and its rank against what servers take."""
    from tunesmith.models.aliases import find_model

    source = find_model(folder)
    if source.kind != "adapter":
        raise AdapterError(f"{folder} is no adapter folder: it holds no adapter_config.json.")
    silence_libraries()
    from tunesmith.export.check import check_adapter

    found = check_adapter(Path(source.path))
    marks = {True: "ok      ", False: "problem ", None: "note    "}
    print_lines(f"{marks[finding.is_right]}{finding.text}" for finding in found)
    problems = sum(finding.is_right is False for finding in found)
    if problems:
        raise AdapterError(f"adapter {folder} has {problems} problem{'s' if problems > 1 else ''}.")

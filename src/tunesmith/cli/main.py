"""``tunesmith COMMAND``: find the command, import only that one, and turn errors into exit codes.

Exit codes: 0 done; 2 something that the user can mend, said in one message; 130 stopped by Ctrl-C. Anything else is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from tunesmith import __version__
from tunesmith.cli.console import print_error
from tunesmith.core.errors import TunesmithError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("tunesmith.cli.train", "Train an adapter on rows, from a YAML file, flags, or both."),
    "plan": ("tunesmith.cli.plan", "Predict memory, disk and speed of a run, and say what it would do to fit."),
    "inspect": ("tunesmith.cli.inspect", "Show what would be trained on: the ledger and the trained tokens."),
    "evaluate": ("tunesmith.cli.evaluate", "Score a model on rows, with the base beside the tuned model."),
    "export": ("tunesmith.cli.export", "Write a run as a folder for other programs, and compare it with the run."),
    "check-adapter": ("tunesmith.cli.check_adapter", "Check an adapter folder against its base and against servers."),
    "chat": ("tunesmith.cli.chat", "Talk to a model or a trained run."),
    "generate": ("tunesmith.cli.generate", "Answer one prompt and print only the answer."),
    "serve": ("tunesmith.cli.serve", "Serve a base and its adapters to many clients, as OpenAI's API."),
    "explain": ("tunesmith.cli.explain", "Say what a setting means, and what too little or too much of it does."),
    "doctor": ("tunesmith.cli.doctor", "Show versions, devices, the dtype choice and optional packages."),
    "demo": ("tunesmith.cli.demo", "Train a small model on a generated task and show what changed."),
}
"""Name -> the module whose function ``command`` it is, and a line for ``--help``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that ``arguments`` (None: those of the process) name, and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our bars and dashes gets question marks
    try:
        _parser_for(words)(args=words, prog_name="tunesmith")
    except TunesmithError as error:
        print_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser_for(words: Sequence[str]) -> Callable[..., None]:
    """Return a parser that knows all names, and what is behind the one in ``words``."""
    app = typer.Typer(
        name="tunesmith",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    line = "Fine-tune open language models on your own data, on one machine, and know what you trained."
    app.callback(help=line)(_options)
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        function = importlib.import_module(module).command if name == wanted else _not_wanted
        app.command(name, short_help=line, help=_unwrapped(function.__doc__))(function)
    # Typer's own call would also replace sys.excepthook.
    return typer.main.get_command(app).main


def _unwrapped(docstring: str | None) -> str:
    """Return a docstring with each paragraph on one line, for a terminal to break where it ends."""
    return "\n\n".join(" ".join(part.split()) for part in (docstring or "").split("\n\n"))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Stand for the options of the program itself; each acts in its own callback."""


def _not_wanted() -> None:
    """Stand in for a command that this call does not run: its name and line are all that is needed."""


if __name__ == "__main__":
    main()

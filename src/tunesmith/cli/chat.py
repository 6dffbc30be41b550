"""``tunesmith chat``: a conversation line by line, in a terminal or from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from tunesmith.cli.console import console, not_utf8, print_lines
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.core.names import did_you_mean

__all__ = ["command"]

_COMMANDS = {
    "/exit": "end (also Ctrl-D)",
    "/clear": "forget the conversation, keep the system message",
    "/system TEXT": "set the system message and start anew; without TEXT remove it",
    "/help": "this list",
}


@settings_flags(["load_in_4bit", "load_in_8bit", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Argument(help="Folder, run, .gguf file, hub id or built-in name.", show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or run to put on the model.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Built-in template or .jinja file, for a base model.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; none: what the hardware computes.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this share together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds sampling.")] = 3407,
    **flags: Any,
) -> None:
    """Talk to a model. Lines that begin with / are commands; /help lists them."""
    from tunesmith.cli.loading import load_for_answers
    from tunesmith.data.templates import require_chat_template

    loaded, tokenizer = load_for_answers(
        model, adapter, chat_template=chat_template, dtype=dtype, **given_settings(flags)
    )
    require_chat_template(tokenizer)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    chat = _Chat(loaded, tokenizer, system, sampling)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (gives input() a history and line editing)

        console().print("/help lists the commands, Ctrl-D ends.", style="dim")
    while (line := _next_line(is_terminal)) is not None:
        if not chat.take(line.strip()):
            break


def _next_line(is_terminal: bool) -> str | None:
    """Return the next line of stdin, None at its end."""
    try:
        return input("> ") if is_terminal else sys.stdin.readline() or None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None


@dataclass(slots=True)
class _Chat:
    """A conversation so far."""

    model: Any
    tokenizer: Any
    system: str | None
    sampling: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Answer a line or obey its command; return False when the conversation is over."""
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return False
        if word == "/clear":
            self.turns.clear()
            print_lines(["The conversation is forgotten."])
        elif word == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
            print_lines(["The system message is set." if self.system else "There is no system message now."])
        elif word == "/help":
            print_lines(f"{name:<14}{meaning}" for name, meaning in _COMMANDS.items())
        elif word.startswith("/"):
            names = [name.split()[0] for name in _COMMANDS]
            print_lines([f"There is no command {word}.{did_you_mean(word, names)} /help lists them."])
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        from tunesmith.cli.generate import stream_answer

        self.turns.append({"role": "user", "content": line})
        self._forget_what_does_not_fit()
        try:
            answer = stream_answer(self.model, self.tokenizer, self._messages(), **self.sampling)
        except KeyboardInterrupt:
            # Ctrl-C ends this answer, not the conversation.
            self.turns.pop()
            print_lines(["", "(stopped; the question is forgotten)"])
            return
        self.turns.append({"role": "assistant", "content": answer})

    def _messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def _forget_what_does_not_fit(self) -> None:
        """Leave out the oldest exchanges when prompt and answer no longer fit the model's window, and say so."""
        from tunesmith.models.load import facts_of
        from tunesmith.models.prompts import require_prompt

        room = facts_of(self.model).window - self.sampling["max_new_tokens"]
        forgotten = 0
        while len(self.turns) > 2 and len(require_prompt(self.tokenizer, self._messages())) > room:
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            print_lines([f"(the oldest {forgotten} of the exchanges no longer fit and are forgotten)"])

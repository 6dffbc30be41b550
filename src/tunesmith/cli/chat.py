"""``tunesmith chat``: a conversation line by line, in a terminal or from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from tunesmith.cli.console import console, not_utf8, print_beside, print_lines, silence_libraries
from tunesmith.cli.flags import check_sampling, given_settings, settings_flags
from tunesmith.cli.voices import BASE, Voices, load_voices
from tunesmith.core.names import did_you_mean

__all__ = ["command"]

_COMMANDS = {
    "/exit": "end (also Ctrl-D)",
    "/clear": "forget the conversation, keep the system message",
    "/system TEXT": "set the system message and start anew; without TEXT remove it",
    "/adapter NAME": "go on with another adapter, or with `base` alone; without NAME list them",
    "/compare TEXT": "ask base and adapter alike; without TEXT the last question again",
    "/help": "this list",
}


@settings_flags(["load_in_4bit", "load_in_8bit", "load_in_fp8", "load_in_16bit"])
def command(
    model: Annotated[str, typer.Argument(help="Folder, run, .gguf file, hub id or built-in name.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter folder or run to put on the model, or NAME=FOLDER; repeatable.", show_default=False),
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
    check_sampling(temperature, top_p, max_new_tokens)
    silence_libraries()  # the imports below have something to say of this machine
    from tunesmith.data.templates import require_chat_template

    voices = load_voices(model, adapter or [], chat_template=chat_template, dtype=dtype, **given_settings(flags))
    require_chat_template(voices.tokenizer)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    chat = _Chat(voices, system, sampling)
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

    voices: Voices
    system: str | None
    sampling: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Answer a line or obey its command; return False when the conversation is over."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/exit":
            return False
        if word == "/clear":
            self.turns.clear()
            print_lines(["The conversation is forgotten."])
        elif word == "/system":
            self.system = rest or None
            self.turns.clear()
            print_lines(["The system message is set." if self.system else "There is no system message now."])
        elif word == "/adapter":
            print_lines(self._choose(rest))
        elif word == "/compare":
            self._compare(rest)
        elif word == "/help":
            print_lines(f"{name:<15}{meaning}" for name, meaning in _COMMANDS.items())
        elif word.startswith("/"):
            names = [name.split()[0] for name in _COMMANDS]
            print_lines([f"There is no command {word}.{did_you_mean(word, names)} /help lists them."])
        elif line:
            self._answer(line)
        return True

    def _choose(self, name: str) -> list[str]:
        """Go on with the adapter ``name``, and return what to say."""
        voices = self.voices
        if not name:
            return [f"{'*' if own == voices.current else ' '} {own}" for own in voices.names]
        if name not in voices.names:
            known = ", ".join(voices.names)
            return [f"There is no adapter {name}.{did_you_mean(name, voices.names)} There are: {known}."]
        voices.use(name)
        return [f"Answers come from {name} now." + (" The conversation goes on." if self.turns else "")]

    def _answer(self, line: str) -> None:
        from tunesmith.cli.generate import stream_answer

        self.turns.append({"role": "user", "content": line})
        if not self._makes_room():
            return
        try:
            with self.voices.speaking(self.voices.current) as (model, tokenizer):
                answer = stream_answer(model, tokenizer, self._messages(), **self.sampling)
        except KeyboardInterrupt:
            # Ctrl-C ends this answer, not the conversation.
            self.turns.pop()
            print_lines(["", "(stopped; the question is forgotten)"])
            return
        self.turns.append({"role": "assistant", "content": answer})

    def _compare(self, line: str) -> None:
        """Show what the base answers beside what the adapter does; the conversation goes on with the adapter's."""
        from tunesmith.evaluation import generate_answers

        current = self.voices.current
        if current == BASE:
            print_lines(["There is nothing to compare: answers come from the base. /adapter NAME chooses another."])
            return
        if line:
            self.turns.append({"role": "user", "content": line})
            if not self._makes_room():
                return
        elif self.turns:
            del self.turns[-1]  # the last answer
        else:
            print_lines(["There is no question yet. Give one: /compare TEXT"])
            return
        answers: dict[str, str] = {}
        try:
            for name in (BASE, current):
                with self.voices.speaking(name) as (model, tokenizer):
                    answers[name] = generate_answers(model, tokenizer, [self._messages()], **self.sampling)[0]
        except KeyboardInterrupt:
            self.turns.pop()
            print_lines(["", "(stopped; the question is forgotten)"])
            return
        self.turns.append({"role": "assistant", "content": answers[current]})
        print_beside(answers)

    def _messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def _makes_room(self) -> bool:
        """Leave out the oldest exchanges when prompt and answer no longer fit the model's window, and say so.

        False: the question alone does not fit, and is forgotten.
        """
        from tunesmith.models.load import facts_of
        from tunesmith.models.prompts import require_prompt

        def tokens() -> int:
            return len(require_prompt(self.voices.tokenizer, self._messages()))

        window, forgotten = facts_of(self.voices.model).window, 0
        room = window - self.sampling["max_new_tokens"]
        while len(self.turns) > 2 and tokens() > room:
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            print_lines([f"(the oldest {forgotten} of the exchanges no longer fit and are forgotten)"])
        if 0 < room < (needed := tokens()):
            self.turns.pop()
            room_for = f"no room for {window - room:,} of an answer in the window of {window:,}"
            print_lines([f"(the question has {needed:,} tokens and leaves {room_for}; it is forgotten)"])
            return False
        return True

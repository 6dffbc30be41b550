"""The part of Go's text/template that a Modelfile of ours uses, and what Ollama gives to it; an error for all else."""

from __future__ import annotations

import re
from typing import Any

_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)


def render(template: str, chat: list[dict[str, str]]) -> str:
    """Return what Ollama makes of ``chat``: .System is all system messages, .Messages are all messages."""
    pieces = _ACTION.split(template)  # text, action, text, ...
    nodes, rest = _parse(list(enumerate(pieces)))
    assert not rest
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    messages = [{"Role": message["role"], "Content": message["content"]} for message in chat]
    out: list[str] = []
    _run(nodes, {"System": system, "Messages": messages}, {}, out)
    return "".join(out)


def _parse(pieces: list[tuple[int, str]]) -> tuple[list[Any], list[tuple[int, str]]]:
    """Return the nodes up to an ``else`` or ``end``, and what follows with it in front."""
    nodes: list[Any] = []
    while pieces:
        index, piece = pieces.pop(0)
        if index % 2 == 0:
            nodes.append(("text", piece))
        elif piece.startswith(("if ", "range ")):
            kind, _, what = piece.partition(" ")
            nodes.append((kind, what, *_branches(pieces)))
        elif piece == "end" or piece.startswith("else"):
            return nodes, [(index, piece), *pieces]
        elif match := re.fullmatch(r"(\$\w+) (:?=) (.+)", piece):
            nodes.append(("set", *match.groups()))
        else:
            nodes.append(("show", piece))
    return nodes, []


def _branches(pieces: list[tuple[int, str]]) -> tuple[list[Any], list[Any]]:
    """Take what follows an ``if`` or ``range`` off ``pieces`` up to its ``end``; return both branches."""
    first, rest = _parse(pieces)
    pieces[:] = rest
    _, word = pieces.pop(0)
    if word == "end":
        return first, []
    if word == "else":
        second, rest = _parse(pieces)
        pieces[:] = rest
        assert pieces.pop(0)[1] == "end"
        return first, second
    return first, [("if", word.removeprefix("else if "), *_branches(pieces))]


def _run(nodes: list[Any], dot: dict[str, Any], variables: dict[str, Any], out: list[str]) -> None:
    for kind, *rest in nodes:
        if kind == "text":
            out.append(rest[0])
        elif kind == "show":
            out.append(_value(rest[0], dot, variables))
        elif kind == "set":
            name, sign, what = rest
            assert (sign == ":=") != (name in variables), "declared once, then assigned"
            variables[name] = _value(what, dot, variables)
        elif kind == "if":
            what, first, second = rest
            _run(first if _value(what, dot, variables) else second, dot, variables, out)
        else:
            what, body, otherwise = rest
            assert not otherwise
            for item in _value(what, dot, variables):
                _run(body, item, variables, out)


def _value(what: str, dot: dict[str, Any], variables: dict[str, Any]) -> Any:
    if what.startswith("eq "):
        left, right = what.split(" ")[1:]
        return _value(left, dot, variables) == _value(right, dot, variables)
    if what.startswith('"'):
        return what[1:-1]
    return variables[what] if what.startswith("$") else dot[what.removeprefix(".")]

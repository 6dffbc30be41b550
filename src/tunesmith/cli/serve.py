"""``tunesmith serve``: one base and its adapters, answered for to many clients at once as OpenAI's API."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.console import print_lines, silence_libraries
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.cli.voices import named_folders
from tunesmith.core.errors import SettingsError
from tunesmith.core.memory import parse_bytes
from tunesmith.models.aliases import ModelSource, find_model
from tunesmith.serving.address import bind
from tunesmith.serving.places import require_adapter

if TYPE_CHECKING:
    import socket

    from tunesmith.serving.engine import Engine

__all__ = ["command"]

_LOCAL = ("127.0.0.1", "localhost", "::1")
_WIDTHS = {None: "", "4bit": ", linear layers in 4 bits", "8bit": ", linear layers in 8 bits",
           "fp8": ", linear layers in float8", "fp8-block": ", linear layers in float8 by blocks"}  # fmt: skip


@settings_flags(["load_in_4bit", "load_in_8bit", "load_in_fp8", "load_in_16bit"])
def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, run, .gguf file, hub id or built-in name; of a run or adapter its base is served, and it "
            "beside it.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter folder or run to serve, or NAME=FOLDER; repeatable.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TUNESMITH_API_KEY",
            help="Key that clients must send. On the command line others on this machine can read it.",
            show_default=False,
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that clients may load adapters from while it runs; repeatable. None: they may not.",
            show_default=False,
        ),
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="What the base is called.", show_default=False)] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait beside them; more get 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; shorter where the window ends.")] = 2048,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    max_adapters: Annotated[int, typer.Option(min=1, help="Adapters kept in memory; others are read again.")] = 16,
    kv_memory: Annotated[str, typer.Option(help="Memory for keys and values of what is being answered.")] = "4GiB",
    max_seq_length: Annotated[
        int | None, typer.Option(min=1, help="Window; none: the model's own.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; none: what the hardware computes.", show_default=False),
    ] = None,
    **flags: Any,
) -> None:
    """Serve a base and any number of adapters beside it. Ctrl-C or SIGTERM finishes what was accepted, then ends."""
    _require_packages()
    memory_bytes, most_body_bytes = parse_bytes(kv_memory), parse_bytes(max_body)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise SettingsError("--api-key is empty or holds characters that a header cannot. Give letters and digits.")
    for root in adapter_root or ():
        if not root.is_dir():
            raise SettingsError(f"--adapter-root {root} is no folder. Make it first.")
    names = _names(model, adapter or (), served_name)
    # Whatever can be said at once is said before the libraries are loaded; the port is held from here on.
    bound = bind(host, port)
    silence_libraries()
    from tunesmith.cli.loading import load_for_answers
    from tunesmith.serving.engine import Engine, made_apart
    from tunesmith.serving.server import Server, make_app

    def make() -> Engine:
        loaded, tokenizer = load_for_answers(
            model, max_seq_length=max_seq_length, dtype=dtype, attach=False, **given_settings(flags)
        )
        return Engine(
            loaded, tokenizer, most_sequences=max_concurrent, most_adapters=max_adapters, memory_bytes=memory_bytes
        )

    engine = made_apart(make)
    is_whole = False
    try:
        for name, folder in names.adapters.items():
            engine.shelf.add(name, folder)
        app = make_app(
            engine,
            name=names.base,
            api_key=api_key,
            adapter_roots=adapter_root or (),
            most_answers=max_concurrent + max_queue,
            most_tokens=max_tokens,
            most_body_bytes=most_body_bytes,
        )
        server = Server(app, lambda: _greet(engine, names, bound, api_key is not None))
        server.run(sockets=[bound])
        is_whole = not server.force_exit
    finally:
        engine.close(drain=is_whole)
    if not is_whole:
        raise KeyboardInterrupt
    print_lines(["stopped; every request that was accepted has its answer"])


@dataclass(frozen=True, slots=True)
class _Names:
    """What the base and the adapters are called, and where those lie."""

    base: str
    adapters: dict[str, Path]


def _names(model: str, typed: Sequence[str], served_name: str | None) -> _Names:
    """Name everything that is served, and look every adapter up."""
    from tunesmith.serving.schema import NAME_PATTERN

    source = find_model(model)
    base = served_name or _base_name(source)
    places = named_folders([*([model] if source.kind == "adapter" else []), *typed], base)
    for name in places:
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise SettingsError(
                f"{name!r} is no name for an adapter: letters, digits and ._:- make one. Give one with --adapter "
                "NAME=FOLDER."
            )
    adapters = {name: require_adapter(folder) for name, folder in places.items()}
    return _Names(base, adapters)


def _base_name(source: ModelSource) -> str:
    """Return what the base is called: a name as it was typed, of a path its last part."""
    if source.kind == "adapter":
        silence_libraries()
        from tunesmith.adapters.state import base_of

        source = base_of(Path(source.path))
    path = Path(source.name)
    if not path.exists():
        return source.name
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _require_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"{' and '.join(missing)} not installed: pip install -e '.[serve]' in the checkout")


def _greet(engine: Engine, names: _Names, bound: socket.socket, has_key: bool) -> None:
    """Say where and what is served, and how to ask."""
    from tunesmith.models.load import facts_of

    host, port = bound.getsockname()[:2]
    facts = facts_of(engine.model)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    asked = next(iter(names.adapters), names.base)
    has_chat = engine.tokenizer_of((names.adapters and asked) or None).chat_template is not None
    body: dict[str, Any] = {"model": asked, "max_tokens": 64}
    body |= {"messages": [{"role": "user", "content": "Hello"}]} if has_chat else {"prompt": "Once upon a time"}
    path = "chat/completions" if has_chat else "completions"
    key = ' -H "Authorization: Bearer $TUNESMITH_API_KEY"' if has_key else ""
    lines = [
        f"serving at {url} (Ctrl-C ends)",
        f"base: {names.base} ({facts.dtype.name}{_WIDTHS[facts.width]}, window of {engine.window:,} tokens)",
        f"adapters: {', '.join(names.adapters) or 'none'}",
    ]
    if not has_key and host not in _LOCAL:
        lines.append(f"note: everyone who reaches {host} can ask; --api-key lets only those who know it")
    lines.append(f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'")
    print_lines(lines)

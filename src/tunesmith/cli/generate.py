"""``tunesmith generate``: one prompt in, one answer out, as it is written."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tunesmith.cli.console import not_utf8, silence_libraries
from tunesmith.cli.flags import check_sampling, given_settings, settings_flags
from tunesmith.core.errors import DataError, SettingsError

__all__ = ["command", "stream_answer"]


@settings_flags(["load_in_4bit", "load_in_8bit", "load_in_fp8", "load_in_16bit"])
def command(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from stdin.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder, run, .gguf file, hub id or built-in name.", show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or run to put on the model.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text itself, without a chat template.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="Built-in template or .jinja file, for a base model.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; none: what the hardware computes.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this share together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds sampling.")] = 3407,
    **flags: Any,
) -> None:
    """Answer one prompt. Only the answer goes to stdout, token by token."""
    if raw and (system is not None or chat_template is not None):
        raise SettingsError("--raw uses no chat template, so --system and --chat-template have no place. Drop them.")
    check_sampling(temperature, top_p, max_new_tokens)
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise DataError("the prompt is empty. Give some text, or - to read it from stdin.")
    silence_libraries()  # the imports below have something to say of this machine
    from tunesmith.cli.loading import load_for_answers

    loaded, tokenizer = load_for_answers(
        model, adapter, chat_template=chat_template, dtype=dtype, **given_settings(flags)
    )
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    stream_answer(loaded, tokenizer, text if raw else messages, **sampling)


def stream_answer(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], **sampling: Any) -> str:
    """Print the answer to ``prompt`` as it is written, and return it; ``sampling`` is that of ``generate_answers``."""
    from transformers import TextStreamer

    from tunesmith.evaluation import generate_answers

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return generate_answers(model, tokenizer, [prompt], streamer=streamer, **sampling)[0]


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None

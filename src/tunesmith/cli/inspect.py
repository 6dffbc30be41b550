"""``tunesmith inspect``: what would be trained on, before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tunesmith.cli.console import console, plain, print_lines, silence_libraries
from tunesmith.cli.flags import given_settings, settings_flags
from tunesmith.core.errors import SettingsError
from tunesmith.models.aliases import find_model
from tunesmith.training.settings import RunSettings, load_run_settings

if TYPE_CHECKING:
    from tunesmith.data.masks import ExampleEncoder
    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.types import Conversation, Document

__all__ = ["Piece", "command", "pieces"]

_CHECKED = 100
_LONGEST_PIECE = 1200


@settings_flags(["model", "map", "train_on", "chat_template", "max_length", "max_seq_length", "on_too_long", "limit"])
def command(
    data: Annotated[str, typer.Argument(help="Rows, as for `train --data`.", show_default=False)],
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
    **flags: Any,
) -> None:
    """Show the data ledger and the first rows with their trained tokens, as training would have them.

    Also checks, on the first 100 conversations, that the training text is the inference prompt followed by the answer.
    Loads the tokenizer or processor only.
    """
    if rows < 0:
        raise SettingsError(f"--rows {rows}: 0 or more is needed.")
    settings, _ = load_run_settings(None, {**given_settings(flags), "data": data})
    # A mistyped name is said at once, not after the seconds that the libraries take to load.
    find_model(settings.model)
    silence_libraries()
    prepared, tokenizer, encoder = _prepare(settings)
    agreement = _check_agreement(settings, encoder)
    if as_json:
        console().print(_as_json(prepared, tokenizer, agreement, rows), soft_wrap=True)
    else:
        from tunesmith.cli.report import print_ledger

        print_ledger(prepared.ledger)
        _print_rows(prepared, tokenizer, rows)
        _print_agreement(agreement)
    prepared.ledger.check()


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of a document as text: all trained or all not; ``is_end`` for a trained end of turn."""

    text: str
    trained: bool
    is_end: bool = False


def pieces(document: Document, tokenizer: Any) -> list[Piece]:
    """Return the text of a document cut where training begins and ends, and around each trained end of turn.

    Joined, the texts are the whole document as the tokenizer decodes it.
    """
    ends = {position for position in document.end_of_turn if document.trained[position]}
    # The first token never is, whatever the mask of a row says: nothing stands before it.
    kinds = [(bool(position and trained), position in ends) for position, trained in enumerate(document.trained)]
    cuts = [position for position in range(1, len(kinds)) if kinds[position] != kinds[position - 1]]
    found: list[Piece] = []
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(kinds)], strict=True):
        # Decoding from the beginning keeps the spaces that a tokenizer drops in front of a first token.
        ids = document.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append(Piece(text[len(shown) :], *kinds[start]))
        shown = text
    return found


@dataclass(frozen=True, slots=True)
class _Agreement:
    """``checked`` conversations, and a sentence for each whose inference prompt is not what it was trained behind."""

    checked: int
    differences: list[str]


def _prepare(settings: RunSettings) -> tuple[PreparedData, Any, ExampleEncoder]:
    from tunesmith.adapters.state import load_source_tokenizer
    from tunesmith.data.prepare import prepare
    from tunesmith.data.vision import encoder_of
    from tunesmith.models.load import DEFAULT_WINDOW

    tokenizer, window = load_source_tokenizer(
        settings.model,
        max_seq_length=settings.max_seq_length or settings.max_length or DEFAULT_WINDOW,
        stretched=settings.stretched(settings.max_seq_length or settings.max_length),
        chat_template=settings.chat_template,
        with_processor=True,
    )
    encoder = encoder_of(tokenizer, settings.train_on)
    prepared = prepare(
        settings.data,
        encoder,
        max_length=settings.max_length or window,
        on_too_long=settings.on_too_long,
        mapping=settings.map,
        limit=settings.limit,
    )
    return prepared, getattr(tokenizer, "tokenizer", tokenizer), encoder


def _check_agreement(settings: RunSettings, encoder: ExampleEncoder) -> _Agreement:
    from tunesmith.data.types import RowRefusedError

    checked, differences = 0, []
    for conversation in islice(_conversations(settings), _CHECKED):
        try:
            found = encoder.check_inference_agreement(conversation)
        except RowRefusedError:
            continue  # the ledger says why
        checked += 1
        differences += [f"{conversation.where}: {sentence}" for sentence in found]
    return _Agreement(checked, differences)


def _conversations(settings: RunSettings) -> Iterator[Conversation]:
    from tunesmith.data.files import read_rows
    from tunesmith.data.formats import to_example
    from tunesmith.data.types import Conversation, RowRefusedError

    for row in islice(read_rows(settings.data), settings.limit):
        try:
            example = to_example(row, settings.map)
        except RowRefusedError:
            continue
        if isinstance(example, Conversation):
            yield example


def _print_rows(prepared: PreparedData, tokenizer: Any, count: int) -> None:
    out = console()
    has_colour = out.color_system is not None
    for row in prepared.rows[:count]:
        for number, document in enumerate(row.documents, 1):
            part = f", document {number} of {len(row.documents)}" if len(row.documents) > 1 else ""
            trained = int(document.trained[1:].sum())
            out.rule(f"{row.where}{part}: {len(document):,} tokens, {trained:,} trained", align="left", style="dim")
            out.print(_coloured(pieces(document, tokenizer), has_colour), soft_wrap=True)
    if prepared.rows[:count]:
        out.rule(style="dim")
        legend = [Piece("not trained ", False), Piece("trained", True), Piece("<end of turn, trained>", True, True)]
        out.print(Text("legend: ").append_text(_coloured(legend, has_colour)))


def _coloured(parts: list[Piece], has_colour: bool) -> Text:
    """Return the pieces in colour, or with ⟦ and ⟧ around what is trained."""
    text = Text()
    was_trained = False
    for piece in parts:
        if not has_colour and piece.trained != was_trained:
            text.append("⟦" if piece.trained else "⟧")
        style = "dim" if not piece.trained else "bold yellow" if piece.is_end else "bold green"
        text.append(_shortened(plain(piece.text)), style=style)
        was_trained = piece.trained
    if was_trained and not has_colour:
        text.append("⟧")
    return text


def _shortened(text: str) -> str:
    """Leave out the middle of a long text, and say how much."""
    left_out = len(text) - _LONGEST_PIECE
    if left_out <= 0:
        return text
    half = _LONGEST_PIECE // 2
    return f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"


def _print_agreement(agreement: _Agreement) -> None:
    title = "training text = inference prompt + answer"
    if not agreement.checked:
        print_lines([f"{title}: not checked, there is no conversation"])
    elif not agreement.differences:
        print_lines([f"{title}: OK (first {agreement.checked:,} conversations)"])
    else:
        wrong = len(agreement.differences)
        print_lines([f"{title}: NO, {wrong:,} differences in the first {agreement.checked:,} conversations:"])
        print_lines(f"  {sentence}" for sentence in agreement.differences[:5])
        print_lines([f"  and {wrong - 5:,} more"] if wrong > 5 else [])


def _as_json(prepared: PreparedData, tokenizer: Any, agreement: _Agreement, count: int) -> str:
    rows = [
        {
            "where": document.where,
            "tokens": len(document),
            "pieces": [
                {"text": piece.text, "trained": piece.trained, "end_of_turn": piece.is_end}
                for piece in pieces(document, tokenizer)
            ],
        }
        for row in prepared.rows[:count]
        for document in row.documents
    ]
    checked = {"conversations": agreement.checked, "differences": agreement.differences}
    report = {"ledger": prepared.ledger.as_dict(), "inference_agreement": checked, "rows": rows}
    return json.dumps(report, ensure_ascii=False, indent=1)

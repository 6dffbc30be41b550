"""A tokenizer as llama.cpp is told of it: tokens, merges or scores, kinds, special tokens and the way text is cut.

llama.cpp has two ways that concern us. "gpt2" cuts text by a regular expression that it knows by a name, and merges
bytes; "llama" (SentencePiece) merges characters, the best-scored pair first. The name of the regular expression is
found by comparing what the tokenizer really uses with what llama.cpp uses under each name, never by the model's name:
an unknown one is refused. Scores are the ranks of the merges; that this comes to the same is checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from tunesmith.core.errors import ExportError

__all__ = ["Vocabulary", "read_vocabulary"]

_PUNCTUATED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BYTES, _DIGITS = "bytes", "digits"
# What text is cut by, and whether a word that is a token is taken before any merge -> llama.cpp's name for that.
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_BYTES,), False): "gpt-2",
    ((_DIGITS, _BYTES), False): "smollm",
    ((_PUNCTUATED % r"\p{N}{1,3}",), True): "llama-bpe",
    ((_PUNCTUATED % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((_PUNCTUATED % r"\p{N}",), False): "qwen2",
    ((_CASED % ("", "", r"\p{N}"),), True): "tekken",
    ((_CASED % (_ENDINGS, _ENDINGS, r"\p{N}{1,3}"),), False): "gpt-4o",
}
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        cut: llama.cpp's name for the way text is cut; None for "llama".
        tokens, kinds: by id, as many as the embedding has rows.
        merges: pairs in their order, for "gpt2".
        scores: by id, for "llama".
        special: "bos", "eos", "eot", "unknown", "padding" -> id.
        stops: ids at which an answer ends.
        adds_bos, adds_eos: whether they are put around a text.
        adds_space: whether a text gets a space before it.
        template: the chat template.
        strips_right: whether special tokens swallow the white space behind them.
        cuts_starts, cuts_behind: whether llama.cpp cuts alike what begins a text, and what follows a special token.
        doubles_spaces: whether llama.cpp puts a space before a text that begins with one, and the tokenizer not.
        composes: whether the tokenizer composes characters first (NFC), which llama.cpp does not.
    """

    model: str
    cut: str | None
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    stops: tuple[int, ...] = ()
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    template: str | None = None
    strips_right: bool = False
    cuts_starts: bool = True
    cuts_behind: bool = True
    doubles_spaces: bool = False
    composes: bool = False

    @property
    def notes(self) -> list[str]:
        """What llama.cpp does otherwise and the user should know."""
        found = []
        if self.composes:
            found.append("llama.cpp does not compose characters: give it text in NFC, as the tokenizer makes it")
        if not self.cuts_starts:
            found.append("llama.cpp puts no space before a text that begins without a special token: use chats")
        if not self.cuts_behind:
            found.append("llama.cpp puts a space behind each special token, and the tokenizer only where a text begins")
        if self.doubles_spaces:
            found.append("llama.cpp puts a space before a text that begins with one too, and the tokenizer does not")
        return found


def read_vocabulary(tokenizer: Any, rows: int, stops: Any = None) -> Vocabulary:
    """Return what llama.cpp must know of ``tokenizer``.

    Args:
        tokenizer: one of transformers with a ``tokenizer.json`` behind it.
        rows: of the embedding; tokens beyond the tokenizer's are written as unused.
        stops: the id or ids at which ``model.generation_config`` ends an answer.
    Raises:
        ExportError: llama.cpp cannot cut text as this tokenizer does, or it has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json behind it, and GGUF is made from that.")
    content = json.loads(backend.to_str())
    if len(tokenizer) > rows:
        raise ExportError(f"the tokenizer has {len(tokenizer)} tokens and the model {rows}. Load it with as many rows.")
    if content["model"]["type"] != "BPE":
        raise ExportError(f"a tokenizer of kind {content['model']['type']} is not written as GGUF: only BPE is.")
    is_spaced = _is_spaced(content)
    cut = None if is_spaced else _cut(content)
    tokens, kinds = _tokens(content, rows, is_spaced)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    around = _around(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    special, ends = _special(tokenizer, stops)
    # A program puts BOS before a chat too: where the template writes none, neither must the file.
    is_bare = template is not None and not _opens_with_bos(tokenizer)
    # llama.cpp puts a space behind each special token, as old tokenizers do, or none. Newer ones do so only where a
    # text begins, which in a chat is a special token.
    adds_always = _has_part(content, "Prepend") or _has_part(content, "Metaspace", "always")
    adds_once = is_spaced and _has_part(content, "Metaspace", "first")
    adds_space = is_spaced and (adds_always or (adds_once and template is None))
    return Vocabulary(
        model="llama" if is_spaced else "gpt2",
        cut=cut,
        tokens=tokens,
        kinds=kinds,
        merges=[] if is_spaced else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges, {token["content"] for token in content["added_tokens"]}) if is_spaced else [],
        special=special,
        stops=ends,
        adds_bos=around[0] and not is_bare,
        adds_eos=around[1],
        adds_space=adds_space,
        doubles_spaces=adds_space and not _has_part(content, "Prepend"),
        template=template if isinstance(template, str) else None,
        strips_right=any(token["rstrip"] for token in content["added_tokens"]),
        cuts_starts=not (adds_once and template is not None),
        cuts_behind=not (adds_once and template is None),
        composes=(content["normalizer"] or {}).get("type") == "NFC",
    )


def _is_spaced(content: dict[str, Any]) -> bool:
    """Return whether spaces become U+2581 and bytes have tokens, as SentencePiece does it."""
    said = json.dumps([content["normalizer"], content["pre_tokenizer"]], ensure_ascii=False)
    return bool(content["model"].get("byte_fallback")) and _SPACE in said


def _cut(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way text is cut."""
    pre = content["pre_tokenizer"] or {}
    parts = pre.get("pretokenizers", [pre])
    found: list[str] = []
    for part in parts:
        if part.get("type") == "ByteLevel" and not part["add_prefix_space"]:
            found += [_BYTES] if part["use_regex"] else []
        elif part.get("type") == "Digits" and part["individual_digits"]:
            found.append(_DIGITS)
        elif part.get("type") == "Split" and part["behavior"] == "Isolated" and "Regex" in part["pattern"]:
            found.append(part["pattern"]["Regex"])
        else:
            found.append(json.dumps(part))
    normalizer = (content["normalizer"] or {"type": "NFC"})["type"]  # llama.cpp leaves composing to the caller
    cut = _CUTS.get((tuple(found), bool(content["model"].get("ignore_merges"))))
    is_bytes = any(part.get("type") == "ByteLevel" for part in parts)
    if cut is None or normalizer != "NFC" or not is_bytes:
        said = json.dumps({"normalizer": content["normalizer"], "pre_tokenizer": pre}, ensure_ascii=False)
        raise ExportError(f"llama.cpp cuts no text as this tokenizer does, so no GGUF is written: {said[:300]}")
    return cut


def _tokens(content: dict[str, Any], rows: int, is_spaced: bool) -> tuple[list[str], list[int]]:
    """Return the tokens by id and their kinds."""
    tokens = [f"[UNUSED{index}]" for index in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for text, index in content["model"]["vocab"].items():
        is_byte = is_spaced and len(text) == 6 and text.startswith("<0x")
        tokens[index], kinds[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in content["added_tokens"]:
        text, index = token["content"], token["id"]
        # Text is searched for these as it is, before spaces become anything else.
        tokens[index] = text if token["special"] or not is_spaced else text.replace(_SPACE, " ")
        kinds[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    unknown = content["model"].get("unk_token")
    if is_spaced and unknown is not None:
        kinds[content["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in kinds]


def _scores(tokens: list[str], merges: list[tuple[str, ...]], added: set[str]) -> list[float]:
    """Return the score of each token: the earlier merged, the higher.

    llama.cpp joins any two neighbours that make a token, the best token first. That is what the merges say only if all
    pairs that make a token are merges, and follow one another; of those in ``added``, which no merge makes in the end,
    nothing is asked.
    """
    rank: dict[str, int] = {}
    last = None
    for index, (left, right) in enumerate(merges):
        made = left + right
        if made in rank and made != last and made not in added:
            raise ExportError(f"the merges of this tokenizer have no order of tokens ({made!r} comes twice).")
        rank.setdefault(made, index)
        last = made
    pairs, known = set(merges), rank.keys() | {token for token in tokens if len(token) == 1}
    for made in (token for token in rank if token not in added):
        for cut in range(1, len(made)):
            pair = (made[:cut], made[cut:])
            if pair not in pairs and pair[0] in known and pair[1] in known:
                raise ExportError(
                    f"llama.cpp would make the token {made!r} of {pair[0]!r} and {pair[1]!r}, and this tokenizer not."
                )
    return [float(-rank[token]) if token in rank else -1e6 for token in tokens]


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether BOS and EOS are put around a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
    before, behind = whole[:start], whole[start + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or behind not in ([], [tokenizer.eos_token_id]):
        raise ExportError(f"this tokenizer puts {before} before and {behind} behind a text, and llama.cpp cannot.")
    return bool(before), bool(behind)


def _has_part(content: dict[str, Any], kind: str, scheme: str | None = None) -> bool:
    """Return whether a step before the merges is of ``kind``, and puts a space before text by ``scheme``."""
    parts = [content["normalizer"] or {}, content["pre_tokenizer"] or {}]
    parts += [part for whole in parts for part in whole.get("normalizers", whole.get("pretokenizers", []))]
    return any(part.get("type") == kind and part.get("prepend_scheme") == scheme for part in parts)


def _special(tokenizer: Any, stops: Any) -> tuple[dict[str, int], tuple[int, ...]]:
    """Return the special tokens that have a name in GGUF, and the ids at which an answer ends."""
    found = {
        name: index
        for name, index in (
            ("bos", tokenizer.bos_token_id),
            ("eos", tokenizer.eos_token_id),
            ("unknown", tokenizer.unk_token_id),
            ("padding", tokenizer.pad_token_id),
        )
        if index is not None
    }
    ends = [stops] if isinstance(stops, int) else list(stops or [])
    # An end beyond the tokenizer has no text that a program could look for.
    ends = [index for index in ends if tokenizer.convert_ids_to_tokens(index) is not None]
    turn = _end_of_turn(tokenizer)
    if turn is not None and turn != found.get("eos"):
        found["eot"] = turn
    ordered = [turn, found.get("eos"), *ends]
    return found, tuple(dict.fromkeys(index for index in ordered if index is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes behind an answer, or None."""
    text = _rendered(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
    if text is None:
        return None
    behind = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((index for index in behind if index in added and added[index].special), None)


def _opens_with_bos(tokenizer: Any) -> bool:
    text = _rendered(tokenizer, [{"role": "user", "content": "question"}])
    return text is None or (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """Return a chat as the tokenizer renders it; None where it has no template, or one that takes no such chat."""
    from jinja2 import TemplateError

    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return None

"""Built-in chat templates, and the rules for putting one on a tokenizer.

A chat template turns messages into the one text that the model reads. Instruct models bring their own; a base model
has none, and there ``chat_template=`` names one of ours or a Jinja file. A template is only worth something if its
marker tokens exist as single tokens in the tokenizer: split into pieces they would be learned as ordinary text, so
that is refused here. What of the rendered text is trained on is decided in ``masks.py``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import TemplateError

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN_TEMPLATES",
    "ChatTemplate",
    "apply_template",
    "family_template",
    "get_template",
    "require_chat_template",
]

log = logging.getLogger(__name__)

# name -> (end of turn, None for the tokenizer's own EOS; tokens that must exist as single tokens).
# Mistral needs none but EOS: the first Mistral models themselves wrote [INST] as ordinary text.
_BUILT_IN: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "chatml": ("<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama-3": ("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": ("<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (None, ()),
}
BUILT_IN_TEMPLATES: tuple[str, ...] = tuple(_BUILT_IN)

# What a marker token looks like inside a template file, in every family known today.
_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_turn>")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template by name.

    Attributes:
        name: a built-in name, or the path of the file it was read from.
        jinja: the template text, rendered by ``tokenizer.apply_chat_template``.
        end_of_turn: the token that ends an assistant turn; None where it is the tokenizer's EOS, or for a file.
        special_tokens: tokens that a tokenizer must have as single tokens.
    """

    name: str
    jinja: str
    end_of_turn: str | None = None
    special_tokens: tuple[str, ...] = ()


# Names of other libraries, without what people write between letters and digits -> what the family's own templates
# write, and ours for a tokenizer that has none; None where that is to come from the model.
_FAMILIES: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("llama3", "llama31", "llama32", "llama33"), ("<|start_header_id|>", "llama-3")),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3n"), ("<start_of_turn>", "gemma")),
    **dict.fromkeys(("gemma4", "gemma4thinking"), ("<|turn>", None)),
    **dict.fromkeys(("qwen25", "qwen3", "qwen3instruct", "qwen3thinking", "imend"), ("<|im_start|>", "chatml")),
    **dict.fromkeys(("gemmachatml", "gemma2chatml", "yichat"), ("<|im_start|>", "chatml")),
    **dict.fromkeys(("lfm2", "lfm25"), ("<|im_start|>", None)),
    **dict.fromkeys(("phi3", "phi35", "zephyr"), ("<|user|>", None)),
    "phi4": ("<|im_sep|>", None),
    "gptoss": ("<|start|>", None),
    "llama": ("[INST]", None),
    "alpaca": ("### Instruction:", None),
    "starling": ("GPT4 Correct User", None),
    "unsloth": (">>> User:", None),
    "vicuna": ("USER:", None),
    "vicunaold": ("### Human:", None),
}


def family_template(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> str | None:
    """Return the template to put on ``tokenizer`` where another library's ``name`` is asked for; None: keep its own.

    An instruct model's own template is kept where it is of that family: it is what the model was trained with.

    Raises:
        SettingsError: it is not, and no built-in template is of that family.
    """
    name = str(name)
    family = _FAMILIES.get(re.sub(r"[-_. ]", "", name.lower()))
    if family is None or name in _BUILT_IN:
        return name
    marker, ours = family
    own = getattr(tokenizer, "tokenizer", tokenizer).chat_template
    if own and marker in str(own):
        log.warning("chat_template=%r: the tokenizer's own template, which is of that family, is kept", name)
        return None
    if ours is None:
        raise SettingsError(
            f"chat_template={name!r}: the tokenizer has {'a template of another family' if own else 'no template'}, "
            "and no built-in one is of that family. Load the instruct model's tokenizer, which brings it, or give the "
            f"template as Jinja text or a .jinja file. Built-in templates are: {', '.join(_BUILT_IN)}."
        )
    log.warning("chat_template=%r: the tokenizer has no template of that family, the built-in %s is used", name, ours)
    return ours


def get_template(name_or_path: str | Path) -> ChatTemplate:
    """Return a built-in template, the one in a file, or the one that the text itself is.

    Raises:
        SettingsError: neither a built-in name nor a readable UTF-8 file; the message lists the names.
    """
    name = str(name_or_path)
    if name in _BUILT_IN:
        end_of_turn, special_tokens = _BUILT_IN[name]
        jinja = resources.files(__package__ or "").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
        return ChatTemplate(name, jinja, end_of_turn, special_tokens)
    if "{%" in name or "{{" in name:
        return ChatTemplate("of your own", name)
    path = Path(name)
    if not path.is_file():
        raise SettingsError(
            f"chat_template={name!r} is neither a built-in template nor a file.{did_you_mean(name, _BUILT_IN)} "
            f"Built-in templates are: {', '.join(_BUILT_IN)}. A file must hold one Jinja chat template."
        )
    try:
        return ChatTemplate(name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"chat_template={name!r} cannot be read as UTF-8 text: {error}") from error


def apply_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path) -> ChatTemplate:
    """Set ``tokenizer.chat_template`` on this instance, after checking that the two fit; return the template.

    The processor of a vision-language model gets it too, when it is given in place of its tokenizer.

    Raises:
        SettingsError: no such template, or its Jinja text does not parse.
        ModelError: marker tokens or EOS are missing in the tokenizer; the message lists them and what would fit.
    """
    given, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    template = get_template(name_or_path)
    missing = _missing_tokens(tokenizer, template)
    if missing:
        fitting = [name for name in _BUILT_IN if not _missing_tokens(tokenizer, get_template(name))]
        raise ModelError(
            f"chat_template={template.name!r} needs {', '.join(missing)}, which this tokenizer does not have as single "
            "tokens: they would be split into pieces, and the end of an answer would never be learned as one token. "
            f"Built-in templates that fit this tokenizer: {', '.join(fitting) or 'none'}. Pass one of them, a template "
            "file that uses tokens the model knows, or a tokenizer with these tokens added."
        )
    _warn_of_split_markers(tokenizer, template)
    _refuse_bad_syntax(tokenizer, template)
    given.chat_template = tokenizer.chat_template = template.jinja
    return template


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ModelError that names ``chat_template=`` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template, but the rows are conversations. Models "
            "without one are usually base models. Pass chat_template= with a built-in name "
            f"({', '.join(_BUILT_IN)}) or the path of a Jinja file, or use the instruct version of the model."
        )


def _missing_tokens(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[str]:
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in template.special_tokens if token not in known]
    if "eos_token" in template.jinja and not tokenizer.eos_token:
        missing.append("an EOS token")
    return missing


def _warn_of_split_markers(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Say which markers of a template *file* are ordinary text here; the built-in ones were checked exactly."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    split = sorted({marker for marker in _MARKER.findall(template.jinja) if marker not in known})
    if split and template.name not in _BUILT_IN:
        log.warning(
            "chat_template=%r writes %s, which this tokenizer does not have as single tokens: where the template "
            "uses them they are trained as ordinary text.",
            template.name,
            ", ".join(split),
        )


def _refuse_bad_syntax(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Render one message: a syntax error belongs to the setting, anything else to the rows that meet it."""
    probe = [{"role": "user", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(probe, chat_template=template.jinja, tokenize=False)
    except TemplateSyntaxError as error:
        raise SettingsError(
            f"chat_template={template.name!r} is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return

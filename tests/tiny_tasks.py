"""Tiny encoders and encoder-decoders with a tokenizer that has pieces, and rows that they can learn from scratch."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

NAMES = ("ann", "bob", "cid", "dora", "eve", "finn", "gus", "hana")
THINGS = ("apples", "pears", "plums", "nuts", "figs", "beans", "limes", "kiwis")
COLOURS = ("red", "green", "blue", "black", "white", "brown")
_WORDS = ("who", "what", "does", "have", "has", "says", "buys", "the", "a", ".", "?", ",", "and", *map(str, range(10)))

_SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "roberta": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 514},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2,
             "forced_eos_token_id": None},
}  # fmt: skip
_CONFIGS = {"bert": "BertConfig", "roberta": "RobertaConfig", "distilbert": "DistilBertConfig", "t5": "T5Config",
            "bart": "BartConfig"}  # fmt: skip


@cache
def tokenizer() -> Any:
    """Return a tokenizer of whole words and letters, with [CLS] before and [SEP] behind a text; one, not to change."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    letters = [chr(code) for code in range(97, 123)]
    # Words that are not here fall into pieces: unhappily = un + ##happi + ##ly.
    pieces = [*letters, *(f"##{letter}" for letter in letters), "un", "##happi", "##willing", "##ly", "janu", "##ary"]
    words = (*NAMES, *THINGS, *COLOURS, *_WORDS)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*specials, *words, *pieces]))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        eos_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def language_tokenizer() -> Any:
    """Return the same with texts that end in the end token and a language, as mBART's do."""
    from tokenizers import processors

    made = copy.deepcopy(tokenizer())
    made.add_tokens(["[xx]"], special_tokens=True)
    made.extra_special_tokens = ["[xx]"]
    ids = [(name, made.convert_tokens_to_ids(name)) for name in ("[SEP]", "[xx]")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [xx]", pair="$A $B [SEP] [xx]", special_tokens=ids
    )
    return made


def save_base(folder: Path, family: str = "bert", *, seed: int = 0, **changes: Any) -> Path:
    """Write a seeded base without a head, and the tokenizer, to ``folder``; encoder-decoders with their output head."""
    import torch
    import transformers

    sizes = {"vocab_size": len(tokenizer()), "pad_token_id": 0, "eos_token_id": 2, **_SIZES[family], **changes}
    config = getattr(transformers, _CONFIGS[family])(**sizes)
    kind = transformers.AutoModelForSeq2SeqLM if family in ("t5", "bart") else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def colour_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return sentences labelled by whether their colour is a warm one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        colour = draw.choice(COLOURS)
        text = f"{draw.choice(NAMES)} has {draw.randint(0, 9)} {colour} {draw.choice(THINGS)}"
        rows.append({"text": text, "label": "warm" if colour in ("red", "brown") else "cold"})
    return rows


def tag_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return sentences with BIO tags: a person, and a number with its thing."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = [draw.choice(NAMES), "has", str(draw.randint(0, 9)), draw.choice(THINGS), "unhappily", "."]
        rows.append({"tokens": tokens, "tags": ["B-PER", "O", "B-THING", "I-THING", "O", "O"]})
    return rows


def question_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return facts and a question about a part of one word or of three."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, colour = draw.choice(NAMES), draw.choice(COLOURS)
        goods = f"{draw.randint(0, 9)} {colour} {draw.choice(THINGS)}"
        facts = [f"{name} {draw.choice(('has', 'buys'))} {goods}", "the a and a", "and the"]
        draw.shuffle(facts)
        question, answer = draw.choice([("who has ?", name), ("what does ?", goods), ("what a ?", colour)])
        rows.append({"question": question, "context": " . ".join(facts), "answer": answer})
    return rows


def translation_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return facts, and the same in another order of words."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, number, colour, thing = draw.choice(NAMES), draw.randint(0, 9), draw.choice(COLOURS), draw.choice(THINGS)
        rows.append({"source": f"{name} has {number} {colour} {thing}",
                     "target": f"{colour} {thing} , {number} , {name}"})  # fmt: skip
    return rows


def pair_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return a fact and the same without its verb, in another order."""
    return [{"anchor": row["source"], "positive": row["target"]} for row in translation_rows(count, seed=seed)]


ROWS = {
    "SEQ_CLS": colour_rows,
    "TOKEN_CLS": tag_rows,
    "QUESTION_ANS": question_rows,
    "SEQ_2_SEQ_LM": translation_rows,
    "FEATURE_EXTRACTION": pair_rows,
}
"""Task -> its generator of rows."""
LABELS = {"SEQ_CLS": ("cold", "warm"), "TOKEN_CLS": ("B-PER", "B-THING", "I-THING", "O")}
FAMILY_OF = {"SEQ_2_SEQ_LM": "t5"}

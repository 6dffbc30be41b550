"""GGUF in real llama.cpp: SmolLM2, its adapter, every family, and exports that are broken."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.export.support import adapt, disturb, loaded
from tests.export.test_gguf import FAMILIES, model_of
from tests.export.tokenizers_of import TEMPLATES, composing, spaced, with_template

from tunesmith.core.errors import ExportError
from tunesmith.data.support_task import generate
from tunesmith.export.gguf import save, trial
from tunesmith.export.gguf.check import Reread
from tunesmith.export.gguf.methods import METHODS
from tunesmith.export.gguf.runtime import ask_llama
from tunesmith.export.gguf.save import GgufReport, save_gguf
from tunesmith.export.gguf.save_lora import save_lora_gguf
from tunesmith.export.verify import compared, reference_of
from tunesmith.training.probes import probes_of_run
from tunesmith.training.run import run_training
from tunesmith.training.settings import RunSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="llama-cpp-python is not installed: make test-slow compiles it",
    ),
]

BARS = {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-3, "q8_0": 0.01, "q6_k": 0.02, "q4_k_m": 0.12}


def texts(tokenizer: Any, count: int = 200) -> list[str]:
    """Return seeded texts of many kinds, with special tokens in some."""
    draw = random.Random(0)
    pieces = [
        *trial.TEXTS, *(text.split(" ")[0] for text in trial.TEXTS), "  ", "\n", "\t", "\r\n", "💡",
        "", "🧑🏽‍🚀", "中", "文",
        "ひらがな", "カタカナ", "한글", "ß", "œuvre", "Ωmega", "١٢٣", "²", "…", "’s", "'S", "_snake_case", "camelCase",
        "if (x != 0) {", "return f(x)[1:];", "#include <stdio.h>", "<div class=\"a\">", "SELECT * FROM t;", "1,234.56",
        "\u00a0", "\u200d", "\u2028", "​zero​width", *tokenizer.all_special_tokens,
    ]  # fmt: skip
    return ["".join(draw.choice(pieces) + draw.choice(["", " ", "\n"]) for _ in range(draw.randint(1, 9)))
            for _ in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """SmolLM2 in float32 with an adapter that was trained for some steps, its tokenizer and the run."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate("train", 60, 0)), encoding="utf-8")
    settings: dict[str, Any] = {"model": "smollm2-135m", "data": str(rows), "max_steps": 12, "r": 8, "dtype": "float32",
                                "learning_rate": 1e-3, "eval_split": 0, "max_seq_length": 512,
                                "output_dir": str(folder / "run")}  # fmt: skip
    run = run_training(RunSettings(**settings)).folder
    return *loaded(run), run


@pytest.fixture(scope="module")
def exported(tuned: tuple[Any, Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, tokenizer, run = tuned
    prompts = [*probes_of_run(run, tokenizer), *prose()]
    return save_gguf(model, tmp_path_factory.mktemp("gguf") / "smol", tokenizer, methods=[*BARS], prompts=prompts)


def too_far(report: GgufReport) -> dict[str, float]:
    """Return the methods whose files are further from the live model than allowed, with their KL divergence."""
    found = {file.method: file.trial.comparison for file in report.files}
    print({method: (round(one.kl, 5), f"{one.top1:.1%}", one.tokens) for method, one in found.items()})
    assert all(one.runtime == "llama.cpp" for one in found.values())
    return {method: one.kl for method, one in found.items() if one.kl > BARS[method]}


PROSE = """\
The library opened in the autumn of that year, in a house that had been a school. There were four rooms on the
ground floor and two above them, and the books stood in no order at all for the first weeks, because nobody had
thought of labels.

Water boils at a lower temperature on a mountain than at the sea, because the air presses less on it. That is why
potatoes take longer to cook there, and why some cooks close the lid of the pot with a clamp, which keeps the steam
inside.

To change a tyre, first loosen the nuts while the wheel still stands on the ground. Then lift the car with the jack
until the wheel turns freely, take the nuts off, and pull the wheel towards you. Put the other one on in the same
way, in the opposite order.

My grandmother kept bees behind the barn. Every summer she gave us a jar of honey each, and every winter she told
the same story of the swarm that had settled on the bell of the church and stopped it from ringing on a Sunday.

A computer stores numbers as rows of switches. With eight of them it can count to two hundred and fifty-five, with
sixteen to sixty-five thousand, and each further switch doubles what can be said. Fractions are kept in two parts,
like numbers in scientific notation.

The train to the coast leaves at seven in the morning and stops at every village on the way. In the afternoon it
comes back with baskets of fish in the last carriage, and people open the windows even when it rains.
"""


def prose() -> list[str]:
    return [paragraph.replace("\n", " ") for paragraph in PROSE.strip().split("\n\n")]


def test_the_model_as_it_was_published_answers_alike(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2()
    report = save_gguf(
        model,
        tmp_path / "smol",
        tokenizer,
        methods=[*BARS],
        prompts=prose(),
    )
    assert too_far(report) == {}


def test_the_tuned_model_answers_alike(exported: GgufReport) -> None:
    assert too_far(exported) == {}
    assert exported.files[0].trial.comparison.kl < 1e-4
    # 576 and 1536 values a row: only the latter is a multiple of the 256 that K-quants need.
    kinds = exported.files[-1].stored.kinds
    assert kinds["Q5_0"] > kinds["Q4_K"] > 0


def test_llama_cpp_cuts_two_hundred_texts_alike(exported: GgufReport, tuned: tuple[Any, Any, Path]) -> None:
    _, tokenizer, _ = tuned
    wanted = texts(tokenizer)
    assert len(set(wanted)) == 200
    found = ask_llama(exported.files[1].path, texts=wanted).tokens
    differing = [text for text, tokens in zip(wanted, found, strict=True)
                 if tokenizer(text, add_special_tokens=False)["input_ids"] != tokens]  # fmt: skip
    assert differing == []


def test_llama_cpp_renders_chats_alike_and_knows_where_answers_end(
    exported: GgufReport, tuned: tuple[Any, Any, Path]
) -> None:
    _, tokenizer, _ = tuned
    file = exported.files[1].path
    chats = [row["messages"][:-1] for row in tiny.chat_rows(10)]
    found = ask_llama(file, chats=chats)
    assert found.chats == [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    assert tokenizer.eos_token_id in found.stops and not found.adds_bos
    # llama.cpp's own renderer, which knows the format by its looks, and has no system message of its own.
    led = [chat if chat[0]["role"] == "system" else [{"role": "system", "content": "s"}, *chat] for chat in chats]
    assert [built_in(file, chat) for chat in led] == [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in led
    ]


def built_in(file: Path, chat: list[dict[str, str]]) -> str:
    import gguf
    import llama_cpp

    template = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents().encode()
    kind = llama_cpp.llama_chat_message
    messages = (kind * len(chat))(*(kind(one["role"].encode(), one["content"].encode()) for one in chat))
    room = ctypes.create_string_buffer(4096)
    length = llama_cpp.llama_chat_apply_template(template, messages, len(chat), True, room, len(room))
    return room.raw[:length].decode()


def test_an_adapter_is_put_on_a_base_that_runs(tuned: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = tuned
    with model.disable_adapter():
        plain = dataclasses.replace(reference_of(model, tokenizer), tokenizer=None)
        base = save_gguf(model, tmp_path / "base", tokenizer, methods="f16", adapters={}).files[0].path
    report = save_lora_gguf(model, tmp_path / "lora", tokenizer, method="f16")
    (file,) = report.files
    assert file.trial.comparison.kl < 1e-3
    live = dataclasses.replace(reference_of(model, tokenizer), tokenizer=None)
    without, beside = ask_llama(base, live), ask_llama(base, live, adapter=file.path)
    assert compared(plain, without.answers, "llama.cpp").kl < 1e-3
    assert compared(live, beside.answers, "llama.cpp").kl < 1e-3 < compared(live, without.answers, "llama.cpp").kl


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alike(family: str, tmp_path: Path) -> None:
    model = disturb(adapt(model_of(family)))
    tokenizer = spaced() if family in ("gemma", "phi3") else with_template("chatml")
    report = save_gguf(model, tmp_path / "out", tokenizer, methods=["f16", "f32"])
    for file in report.files:
        print(family, file.method, file.trial.comparison.kl, file.trial.comparison.top1)
        assert file.trial.comparison.runtime == "llama.cpp" and file.trial.texts > 20
    assert report.files[1].trial.comparison.kl < 1e-4
    (lora,) = save_lora_gguf(model, tmp_path / "lora", tokenizer).files
    assert lora.trial.comparison.kl < 1e-4


_TRAINED = {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("qwen2", {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, **_TRAINED}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 8.0, **_TRAINED}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_TRAINED}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
                  "partial_rotary_factor": 1.0, "original_max_position_embeddings": 256}),
    ],
)  # fmt: skip
def test_stretched_windows_answer_alike(family: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_parameters": {"rope_theta": 1e4, **scheme}}
    if family == "phi3":
        rope["original_max_position_embeddings"] = 256
    model = tiny.tiny_model(family, **rope)
    (file,) = save_gguf(model, tmp_path / "out", tiny.tiny_tokenizer(), methods="f32").files
    assert file.trial.comparison.kl < 1e-4


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_rendered_alike(name: str, tmp_path: Path) -> None:
    tokenizer = with_template(name)
    (file,) = save_gguf(tiny.tiny_model("llama"), tmp_path / "out", tokenizer, methods="f16").files
    assert file.trial.chats == 3 and file.trial.unknown_stops == ()


def chatty(**how: Any) -> Any:
    tokenizer = spaced(**how)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [composing, spaced, lambda: spaced(prepends=False), lambda: spaced(scheme="always"), lambda: spaced(scheme="first"),
     lambda: spaced(scheme="never"), chatty, lambda: chatty(scheme="first")],
)  # fmt: skip
def test_every_kind_of_tokenizer_cuts_alike(make: Any, tmp_path: Path) -> None:
    (file,) = save_gguf(tiny.tiny_model("llama"), tmp_path / "out", make(), methods="f16").files
    assert file.trial.texts >= len(trial.TEXTS) - 1


def test_methods_of_llama_cpp_are_made_and_said(tuned: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, tokenizer, run = tuned
    own = [method.name for method in METHODS.values() if not method.is_native and not method.needs_imatrix]
    report = save_gguf(
        model, tmp_path / "out", tokenizer, methods=own, first="f16", prompts=probes_of_run(run, tokenizer)
    )
    print({file.method: (round(file.trial.comparison.kl, 4), file.size >> 20) for file in report.files})
    assert [file.method for file in report.files] == own
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {f"out.{name.upper()}.gguf" for name in own}


def test_an_importance_matrix_is_used(tmp_path: Path) -> None:
    import gguf

    model = tiny.tiny_model("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    writer.add_type("imatrix")
    draw = np.random.default_rng(0)
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{layer}.{part}.weight"
            writer.add_tensor(f"{name}.in_sum2", draw.exponential(size=(1, 256)).astype(np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bars = {name: dataclasses.replace(METHODS[name], bar=99.0) for name in ("iq2_xs", "q4_k_m")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "iq2_xs", bars["iq2_xs"])  # random weights do not bear two bits
        patch.setitem(METHODS, "q4_k_m", bars["q4_k_m"])
        how = {"methods": ["iq2_xs", "q4_k_m"], "imatrix": tmp_path / "imatrix.gguf"}
        helped = save_gguf(model, tmp_path / "helped", tiny.tiny_tokenizer(), **how)
        plain = save_gguf(model, tmp_path / "plain", tiny.tiny_tokenizer(), methods="q4_k_m")
    assert "IQ2_XS" in helped.files[0].stored.kinds
    assert helped.files[1].path.read_bytes() != plain.files[0].path.read_bytes()


def test_what_is_broken_is_caught_by_what_llama_cpp_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rereading is switched off: the trial alone must see it."""
    monkeypatch.setattr(save, "reread", lambda *_: Reread({}, {}))
    model, tokenizer = disturb(adapt(tiny.tiny_model("llama"))), tiny.tiny_tokenizer()
    whole = save._write_native

    def altered(source: Any, path: Path, name: str, method: Any) -> None:
        tensors = [dataclasses.replace(one, make=lambda one=one: one.make()[::-1].copy()) if "blk.1.ffn_up" in one.name
                   else one for one in source.tensors]  # fmt: skip
        whole(dataclasses.replace(source, tensors=tensors), path, name, method)

    def templated(source: Any, path: Path, name: str, method: Any) -> None:
        wrong = dataclasses.replace(
            source.vocabulary, template=source.vocabulary.template.replace("assistant", "helper")
        )
        whole(dataclasses.replace(source, vocabulary=wrong), path, name, method)

    def cut(source: Any, path: Path, name: str, method: Any) -> None:
        wrong = dataclasses.replace(source.vocabulary, merges=source.vocabulary.merges[:5])
        whole(dataclasses.replace(source, vocabulary=wrong), path, name, method)

    for change, message in (
        (altered, "answers in llama.cpp otherwise"),
        (templated, "the chat template in"),
        (cut, "cuts "),
    ):
        monkeypatch.setattr(save, "_write_native", change)
        with pytest.raises(ExportError, match=message):
            save_gguf(model, tmp_path / change.__name__, tokenizer, methods="f32")
        assert (tmp_path / f"{change.__name__}-failed").is_dir()


def test_a_file_that_llama_cpp_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ExportError, match=r"llama.cpp cannot load what was exported: .+"):
        ask_llama(tmp_path / "bad.gguf")

"""llama.cpp, in a process of its own: what a GGUF file answers there, how it cuts text and how it renders chats.

It is C++ and may end the process it runs in, and nothing of the live model can help it in another. Memory layouts that
a processor may claim and fail to have (``use_extra_bufts``) stay off: slower, and never a crash.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.core.errors import ExportError

if TYPE_CHECKING:
    from tunesmith.export.verify import Reference

__all__ = ["INSTALL", "Answers", "ask_llama", "has_llama", "run_python"]

INSTALL = (
    "llama-cpp-python is not installed: CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON' "
    "pip install -e '.[gguf]' in the checkout compiles it"
)
"""How to get it. Its default build crashes on processors with AMX."""

_PACKAGE = "llama_cpp"
_ERROR = 4  # of enum ggml_log_level


def has_llama() -> bool:
    """Return whether llama.cpp can be run here."""
    return importlib.util.find_spec(_PACKAGE) is not None


@dataclass(frozen=True, slots=True)
class Answers:
    """What llama.cpp made of a file.

    Attributes:
        answers: ``logprobs-<n>`` (T, V) float32 of each probe and ``text-<n>``, the ids of each greedy text.
        tokens: of each text.
        chats: each conversation as a prompt.
        stops: token ids that end an answer.
        adds_bos: whether it puts BOS before a text.
    """

    answers: dict[str, np.ndarray]
    tokens: list[list[int]]
    chats: list[str]
    stops: list[int]
    adds_bos: bool


def ask_llama(
    file: Path,
    reference: Reference | None = None,
    *,
    texts: Sequence[str] = (),
    chats: Sequence[list[dict[str, str]]] = (),
    adapter: Path | None = None,
) -> Answers:
    """Load ``file`` in llama.cpp, with a LoRA ``adapter`` beside it, and return what it answers.

    ``reference``: the probes and texts that are asked for.

    Raises:
        ExportError: llama.cpp is not there, cannot load the file, or crashes.
    """
    import torch

    if not has_llama():
        raise ExportError(f"{INSTALL}.")
    lengths = [len(text) for text in reference.texts] if reference else []
    request = {"file": str(file), "adapter": adapter and str(adapter), "texts": list(texts), "chats": list(chats),
               "lengths": lengths, "threads": torch.get_num_threads()}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        asked = (*reference.probes, *reference.beginnings) if reference else ()
        np.savez(Path(place) / "probes.npz", *asked)
        run_python(__name__, "llama.cpp cannot load what was exported", place, json.dumps(request))
        with np.load(Path(place) / "answers.npz") as loaded:
            answers = {name: loaded[name] for name in loaded.files}
        return Answers(answers=answers, **json.loads((Path(place) / "answers.json").read_text(encoding="utf-8")))


def run_python(module: str, failure: str, *arguments: str) -> None:
    """Run a module of ours in another process.

    Raises:
        ExportError: it failed; the message begins with ``failure`` and ends with what was said last.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ExportError(f"{failure}: it was ended by signal {-done.returncode}. Build it anew: {INSTALL}.")
    if done.returncode > 0:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
        raise ExportError(f"{failure}: {said.strip()[:500]}")


class _Session:
    """A file loaded in this process."""

    def __init__(self, request: Mapping[str, Any], longest: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.said: list[str] = []

        @llama_cpp.llama_log_callback
        def listen(level: int, text: bytes, _: Any) -> None:
            if level >= _ERROR:
                self.said.append(text.decode(errors="replace").strip())

        self._listen = listen  # ctypes keeps no reference
        llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers, how.use_extra_bufts = 0, False
        self.model = self._there(llama_cpp.llama_model_load_from_file(request["file"].encode(), how))
        self.vocab = self._there(llama_cpp.llama_model_get_vocab(self.model))
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = max(64, longest)
        how.n_threads = how.n_threads_batch = request["threads"]
        self.context = self._there(llama_cpp.llama_init_from_model(self.model, how))
        self.batch = llama_cpp.llama_batch_init(how.n_ctx, 0, 1)
        self.width = llama_cpp.llama_vocab_n_tokens(self.vocab)
        if request["adapter"]:
            self.put_on(request["adapter"])

    def _there(self, found: Any) -> Any:
        if not found:
            raise RuntimeError(" ".join(dict.fromkeys(self.said[-3:])) or "it gave no reason")
        return found

    def put_on(self, adapter: str) -> None:
        """Put a LoRA adapter on the loaded model."""
        loaded = self._there(self.api.llama_adapter_lora_init(self.model, adapter.encode()))
        adapters = (self.api.llama_adapter_lora_p_ctypes * 1)(loaded)
        if self.api.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise RuntimeError("the adapter cannot be put on")

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return the log-probabilities (T, V) after each token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError(" ".join(self.said[-3:]) or "llama_decode failed")
        found = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(tokens), self.width)).copy()
        found -= found.max(-1, keepdims=True)
        return found - np.log(np.exp(found).sum(-1, keepdims=True))

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text without BOS; special tokens in it are found."""
        content = text.encode()
        room = len(content) + 8
        into = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, content, len(content), into, room, False, True)
        return list(into[:count])

    def rendered(self, chat: list[dict[str, str]]) -> str:
        """Return the prompt that the file's chat template makes, up to where the answer begins."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self._there(self.api.llama_model_chat_template(self.model, None)).decode()
        bos, eos = self.api.llama_vocab_bos(self.vocab), self.api.llama_vocab_eos(self.vocab)
        render = Jinja2ChatFormatter(template, eos_token=self._text(eos), bos_token=self._text(bos))
        return render(messages=chat).prompt  # pyright: ignore[reportArgumentType]

    def _text(self, token: int) -> str:
        return self.api.llama_vocab_get_text(self.vocab, token).decode() if token >= 0 else ""

    def continued(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """Return the ``count`` likeliest tokens behind ``tokens``, one after another."""
        found = tokens
        for _ in range(count):
            found = np.append(found, self.logprobs(found)[-1].argmax())
        return found[len(tokens) :]


def _answer(place: str, asked: str) -> None:
    request = json.loads(asked)
    with np.load(Path(place) / "probes.npz") as loaded:
        probes = [loaded[name] for name in loaded.files]
    count = len(probes) - len(request["lengths"])
    texts = list(zip(probes[count:], request["lengths"], strict=True))
    longest = max([*map(len, probes), *(len(beginning) + length for beginning, length in texts)], default=0)
    session = _Session(request, longest)
    found: dict[str, Any] = {f"logprobs-{index}": session.logprobs(probe) for index, probe in enumerate(probes[:count])}
    found |= {f"text-{index}": session.continued(*text) for index, text in enumerate(texts)}
    np.savez(Path(place) / "answers.npz", **found)
    answers = {
        "tokens": [session.tokens(text) for text in request["texts"]],
        "chats": [session.rendered(chat) for chat in request["chats"]],
        "stops": [index for index in range(session.width) if session.api.llama_vocab_is_eog(session.vocab, index)],
        "adds_bos": bool(session.api.llama_vocab_get_add_bos(session.vocab)),
    }
    (Path(place) / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _answer(*sys.argv[1:])

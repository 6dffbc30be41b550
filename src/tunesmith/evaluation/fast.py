"""``model.fast_generate``, ``load_lora`` and ``save_lora``, as scripts written for Unsloth call them.

Without ``fast_inference=True`` the first is ``model.generate``. With it vLLM answers (``serving/vllm.py``), after it
has been compared with the live model: the log-probabilities of what it says first after fixed texts, of the base when
it starts and of each adapter when it is loaded. (Those of the texts themselves it cannot give beside adapters on a CPU:
vLLM 0.32 ends over that.) An adapter goes to vLLM as the matrices that were read and checked here, with their scale in
B, and under a name of its own each time, so that neither patterns of ranks nor a cache of older keys and values can
give other answers than the folder holds.
"""

from __future__ import annotations

import types
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import AdapterError, ModelError, NotSupportedYetError, ServingError, SettingsError
from tunesmith.engine.host import compute_device
from tunesmith.engine.modes import adapter_disabled, evaluation_mode
from tunesmith.export.verify import PROBES
from tunesmith.models.load import facts_of
from tunesmith.models.prompts import encode_prompt, stop_token_ids
from tunesmith.serving.adapters import read_adapter
from tunesmith.serving.lora import Adapter
from tunesmith.serving.outputs import LoraRequest, RequestOutput, SamplingParams, as_params, output_of
from tunesmith.serving.places import require_adapter
from tunesmith.serving.vllm import BASE, WITHOUT_VLLM, Vllm, VllmOptions, refuse_for_vllm, start_vllm

__all__ = ["FastInference", "with_fast_generate", "with_vllm"]

_LONGEST, _SAID, _LIKELIEST = 64, 8, 5  # tokens of a probe, of the answer to it, and compared at each place of that
# SmolLM2-135M on a CPU: 1e-5 in float32, 0.07 in bfloat16, whose logits lie an eighth apart.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.03}
_ROUNDED_LIMIT = 0.4
"""Mean difference of log-probabilities in nats, by dtype; of 4-bit weights, and of float8 keys and values."""

Said = tuple[list[int], list[dict[int, float]]]
"""Token ids of a probe and its answer, and the log-probabilities of the likeliest tokens at each place of that."""


def with_fast_generate(model: Any) -> Any:
    """Return ``model`` with the functions below as methods of this instance."""
    model.fast_generate = types.MethodType(fast_generate, model)
    model.load_lora = types.MethodType(load_lora, model)
    model.save_lora = types.MethodType(save_lora, model)
    return model


def with_vllm(model: Any, options: VllmOptions, *, cache_dir: str | None = None, revision: str | None = None) -> Any:
    """Return ``model`` with vLLM beside it, started and compared with it.

    Args:
        cache_dir, revision: where the files of a hub model are, as it was loaded with.

    Raises:
        ModelError: vLLM is not installed, does not serve this model, or answers otherwise.
        SettingsError: an option that has no effect here.
    """
    refuse_for_vllm(model)
    facts = facts_of(model)
    vllm = start_vllm(model, _files(model, cache_dir, revision), facts.tokenizer, options)
    fast = FastInference(vllm, options, [_probe(facts.tokenizer, text, facts.window) for text in PROBES])
    facts.fast = fast
    try:
        fast.compare_base(model)
    except BaseException:
        vllm.close()
        raise
    return model


def fast_generate(
    model: Any,
    inputs: Any = None,
    sampling_params: Any = None,
    lora_request: Any = None,
    use_tqdm: bool = True,
    **arguments: Any,
) -> Any:
    """Return the answers of vLLM, or without ``fast_inference=True`` what ``model.generate`` does.

    Args:
        inputs: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these; without
            ``fast_inference`` what ``generate`` takes, as do ``arguments``.
        sampling_params: a :class:`tunesmith.SamplingParams`, or one of vLLM's; None: its defaults (16 tokens).
        lora_request: from :func:`load_lora`; None asks the base without an adapter.
        use_tqdm: show how many prompts are answered.

    Returns:
        A :class:`tunesmith.serving.outputs.RequestOutput` for each prompt, in their order.

    Raises:
        NotSupportedYetError: texts, ``sampling_params`` or ``lora_request`` without ``fast_inference``.
        SettingsError: an argument that vLLM is not given, or that it refuses; a prompt that cannot be answered.
        AdapterError: see :func:`load_lora`; the folder is read again where its files have changed.
        ServingError: vLLM failed or is gone.
    """
    fast = facts_of(model).fast
    if fast is not None:
        if arguments:
            raise SettingsError(
                f"fast_generate({next(iter(arguments))}=...): vLLM answers, so say it in sampling_params="
                "tunesmith.SamplingParams(...), where max_new_tokens is max_tokens."
            )
        return fast.generate(model, inputs, as_params(sampling_params), lora_request, use_tqdm)
    is_text = isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and any(isinstance(x, str) for x in inputs))
    if is_text or sampling_params is not None or lora_request is not None:
        raise NotSupportedYetError(
            "fast_generate takes texts, sampling_params and lora_request only where vLLM generates, which "
            "from_pretrained(..., fast_inference=True) asks for. Give token ids and the arguments of generate, or use "
            "tunesmith.evaluation.generate_answers for texts; many at once, with many adapters: "
            "tunesmith.serving.engine.Engine."
        )
    return model.generate(inputs, **arguments) if inputs is not None else model.generate(**arguments)


def load_lora(model: Any, path: str, load_tensors: bool = True) -> LoraRequest:
    """Return what ``lora_request=`` takes for the adapter in the folder ``path``.

    Args:
        load_tensors: read, check and compare it now; False: when it is first asked for.

    Raises:
        AdapterError: there is none, it cannot lie beside the base, its rank is above ``max_lora_rank``, vLLM does not
            take it, or answers with it as without it, or otherwise than the live model.
        NotSupportedYetError: the model was loaded without ``fast_inference=True``.
    """
    fast = facts_of(model).fast
    if fast is None:
        raise NotSupportedYetError(
            "load_lora gives an adapter to vLLM, which from_pretrained(..., fast_inference=True) asks for. Without it "
            "use model.load_adapter(path, name)."
        )
    request = fast.request(path)
    if load_tensors:
        fast.name_of(model, request)
    return request


def save_lora(model: Any, save_directory: str) -> None:
    """Save the adapter of ``model`` as ``model.save_pretrained`` does.

    Raises:
        AdapterError: the model carries none.
    """
    if not hasattr(model, "peft_config"):
        raise AdapterError("save_lora saves an adapter, and this model carries none: get_peft_model adds one.")
    model.save_pretrained(save_directory)


@dataclass
class FastInference:
    """vLLM beside a live model.

    Attributes:
        probes: token ids that answers are compared to.
        base: what vLLM says to them without an adapter.
        names: folder of an adapter -> what its files were, and the name under which vLLM has them.
    """

    vllm: Vllm
    options: VllmOptions
    probes: list[list[int]]
    base: list[Said] = field(default_factory=list)
    names: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    _requests: dict[Path, LoraRequest] = field(default_factory=dict)
    _loads: int = 0

    def generate(
        self, model: Any, inputs: Any, params: SamplingParams, request: Any, use_tqdm: bool
    ) -> list[RequestOutput]:
        """Return the answers of vLLM; see :func:`fast_generate`."""
        from tqdm import tqdm

        tokenizer, window = facts_of(model).tokenizer, facts_of(model).window
        prompts = [_prompt(tokenizer, prompt, row, window) for row, prompt in enumerate(_listed(inputs), 1)]
        name = BASE if request is None else self.name_of(model, request)
        bodies = [self._body(model, name, ids, params) for _, ids in prompts]
        with tqdm(total=len(bodies), disable=not use_tqdm, desc="vLLM") as bar:
            answers = self.vllm.ask_all("/v1/completions", bodies, bar.update)

        def word(token: int) -> str:
            return tokenizer.decode([token])

        return [
            output_of(answer, number=number, prompt=text, ids=ids, params=params, request=request, word=word)
            for number, ((text, ids), answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def _body(self, model: Any, name: str, ids: list[int], params: SamplingParams) -> dict[str, Any]:
        facts = facts_of(model)
        room = facts.window - len(ids)
        body = {**params.body(), "model": name, "prompt": ids, "return_token_ids": True}
        body |= {"return_tokens_as_token_ids": True, "max_tokens": min(params.max_tokens or room, room)}
        if not params.ignore_eos:
            # vLLM knows the tokenizer's own end token, and names no reason where that ends an answer.
            ends = set(stop_token_ids(model, facts.tokenizer)) - {facts.tokenizer.eos_token_id}
            body["stop_token_ids"] = sorted({*(params.stop_token_ids or ()), *ends})
        return body

    def request(self, path: str) -> LoraRequest:
        """Return the request for the adapter in ``path``, one for each folder."""
        folder = require_adapter(str(path)).absolute()
        made = LoraRequest(folder.name, len(self._requests) + 1, str(folder))
        return self._requests.setdefault(folder, made)

    def name_of(self, model: Any, request: Any) -> str:
        """Return the name under which vLLM has the adapter of ``request`` as its files are now; see :func:`load_lora`.

        What was loaded of them before is forgotten by vLLM.
        """
        path = getattr(request, "lora_path", None)
        if not isinstance(path, str):
            raise SettingsError(
                f"lora_request is a {type(request).__name__}. Give what model.load_lora(path) returned."
            )
        folder = require_adapter(path).absolute()
        stamp = _stamp(folder)
        known = self.names.get(folder)
        if known is not None and known[0] == stamp:
            return known[1]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        adapter = read_adapter(path, folder, base, facts_of(model).tokenizer)
        self._loads += 1
        name = f"{folder.name}-{self._loads}"
        self._load(name, adapter)
        try:
            self._compare_adapter(model, name, adapter)
        except BaseException:
            self.vllm.ask("/v1/unload_lora_adapter", {"lora_name": name})
            raise
        if known is not None:
            self.vllm.ask("/v1/unload_lora_adapter", {"lora_name": known[1]})
        self.names[folder] = stamp, name
        return name

    def _load(self, name: str, adapter: Adapter) -> None:
        """Give the matrices of ``adapter`` to vLLM, which reads a folder, and may read it again later."""
        from peft import LoraConfig
        from safetensors.torch import save_file

        rank = max(a.shape[0] for a, _ in adapter.pairs.values())
        if rank > self.options.rank:
            raise AdapterError(
                f"adapter {adapter.name} has rank {rank}, and vLLM was started for ranks up to {self.options.rank}. "
                f"Load the model with max_lora_rank={rank}."
            )
        place, weights = self.vllm.place / name, {}
        for module, (a, sb) in adapter.pairs.items():
            weights[f"base_model.model.{module}.lora_A.weight"] = a.cpu()
            weights[f"base_model.model.{module}.lora_B.weight"] = sb.T.contiguous().cpu()
        targets = sorted({module.rpartition(".")[2] for module in adapter.pairs})
        # A scale of 1: it lies in B, also where modules differ in it.
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(place))
        save_file(weights, place / "adapter_model.safetensors", metadata={"format": "pt"})
        try:
            self.vllm.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        except (SettingsError, ServingError) as error:
            raise AdapterError(f"adapter {adapter.name} is not loaded: {error}") from error

    def compare_base(self, model: Any) -> None:
        """Compare vLLM without adapters with the base of ``model``.

        Raises:
            ModelError: they differ by more than rounding does.
        """
        self.base = self._asked(BASE)
        with adapter_disabled(model) if hasattr(model, "peft_config") else nullcontext():
            fault = self._fault(model, self.base)
        if fault is not None:
            raise ModelError(f"vLLM answers otherwise than {facts_of(model).name} does here: {fault}. {WITHOUT_VLLM}")

    def _compare_adapter(self, model: Any, name: str, adapter: Adapter) -> None:
        found, fault = self._asked(name), None
        if found == self.base and any(b.any() for _, b in adapter.pairs.values()):
            fault = "as without it, though its weights are not zero"
        elif _is_live(model, adapter) and (differs := self._fault(model, found)) is not None:
            fault = f"otherwise than the model here: {differs}"
        if fault is not None:
            raise AdapterError(
                f"vLLM answers with adapter {adapter.name} {fault}. Merge it (save_pretrained_merged) and load the "
                "merged model."
            )

    def _asked(self, name: str) -> list[Said]:
        """Return what vLLM says to the probes."""
        params = SamplingParams(temperature=0, max_tokens=_SAID, ignore_eos=True, logprobs=_LIKELIEST)
        how = {**params.body(), "model": name, "return_token_ids": True, "return_tokens_as_token_ids": True}
        answers = self.vllm.ask_all("/v1/completions", [{**how, "prompt": ids} for ids in self.probes], int)
        found: list[Said] = []
        for ids, answer in zip(self.probes, answers, strict=True):
            said = output_of(answer, number=0, prompt=None, ids=ids, params=params, request=None, word=str).outputs[0]
            places = [{token: entry.logprob for token, entry in place.items()} for place in said.logprobs or ()]
            found.append(([*ids, *said.token_ids], places))
        return found

    def _fault(self, model: Any, said: list[Said]) -> str | None:
        """Return how ``said`` differs from what ``model`` says, with the adapters that are on; None: by rounding."""
        device, gaps = compute_device(model), []
        with torch.no_grad(), evaluation_mode(model):
            for ids, places in said:
                scores = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
                scores = scores[-len(places) - 1 : -1].float().log_softmax(-1).cpu()
                for own, place in zip(scores, places, strict=True):
                    gaps += [abs(own[token].item() - value) for token, value in place.items()]
        gap, limit = sum(gaps) / len(gaps), self._limit(model)
        return None if gap <= limit else f"log-probabilities differ by {gap:.3g} nats, where {limit:.3g} is rounding"

    def _limit(self, model: Any) -> float:
        is_rounded = facts_of(model).width is not None or self.options.float8_kv_cache
        return _ROUNDED_LIMIT if is_rounded else _LIMITS[facts_of(model).dtype.dtype]


def _files(model: Any, cache_dir: str | None, revision: str | None) -> Path:
    """Return the folder that the base of ``model`` was loaded from, for a hub id that of its files in the cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    place = Path(base.name_or_path)
    if place.is_dir():
        return place.absolute()
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(base.name_or_path, "config.json", cache_dir=cache_dir, revision=revision)
    if not isinstance(file, str):
        raise ModelError(f"fast_inference=True: the files of {base.name_or_path} are not in the cache. {WITHOUT_VLLM}")
    return Path(file).parent


def _probe(tokenizer: Any, text: str, window: int) -> list[int]:
    return tokenizer(text)["input_ids"][: min(_LONGEST, window - _SAID)]


def _listed(inputs: Any) -> list[Any]:
    """Return ``inputs`` as a list of prompts."""
    if isinstance(inputs, (str, dict)) or _is_ids(inputs):
        return [inputs]
    if isinstance(inputs, (list, tuple)):
        return list(inputs)
    raise SettingsError(
        f"fast_generate got a {type(inputs).__name__}. Give a text, token ids (a list), {{'prompt': text}} or "
        "{'prompt_token_ids': ids}, or a list of these."
    )


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(type(token) is int for token in prompt)


def _prompt(tokenizer: Any, prompt: Any, row: int, window: int) -> tuple[str | None, list[int]]:
    """Return text and token ids of a prompt; a BOS that the text begins with is not written twice."""
    if isinstance(prompt, dict):
        known = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        others = sorted(map(str, {*prompt} - {"prompt_token_ids", "prompt"}))
        if len(known) != 1 or others:
            raise SettingsError(
                f"prompt {row} has the keys {', '.join(map(str, prompt))}; it may have prompt or prompt_token_ids "
                "alone. Chats go through tokenizer.apply_chat_template(..., tokenize=False) first."
            )
        prompt = prompt[known[0]]
    text = prompt if isinstance(prompt, str) else None
    if text is None and not _is_ids(prompt):
        raise SettingsError(f"prompt {row} is {prompt!r:.80}. Give a text or a list of token ids, not an empty one.")
    ids = list(prompt) if text is None else encode_prompt(tokenizer, text)
    if text is not None and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        ids = ids[ids[:2] == [tokenizer.bos_token_id] * 2 :]
    if not ids:
        raise SettingsError(f"prompt {row} is empty: it has no token to go on from.")
    if len(ids) >= window:
        raise SettingsError(
            f"prompt {row} has {len(ids)} tokens, and the window of {window} has no room for an answer."
        )
    return text, ids


def _stamp(folder: Path) -> tuple[int, ...]:
    """Return what changes whenever the files of an adapter are written."""
    states = [(folder / name).stat() for name in ("adapter_config.json", "adapter_model.safetensors")]
    return tuple(part for state in states for part in (state.st_mtime_ns, state.st_size, state.st_ino))


def _is_live(model: Any, adapter: Adapter) -> bool:
    """Say whether ``adapter`` is the one that ``model`` answers with now."""
    if not hasattr(model, "peft_config") or list(model.active_adapters) != ["default"]:
        return False
    base, found = model.get_base_model(), 0
    for module, (a, sb) in adapter.pairs.items():
        layer = base.get_submodule(module)
        if "default" not in getattr(layer, "lora_A", ()):
            return False
        found += 1
        own = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T.float() * layer.scaling["default"]
        if not all(torch.equal(o.to(t), t) for o, t in zip(own, (a, sb), strict=True)):
            return False
    return found == sum("default" in getattr(layer, "lora_A", ()) for layer in base.modules())

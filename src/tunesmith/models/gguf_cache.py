"""A GGUF file as a transformers folder, converted once.

Reading a GGUF through transformers takes 15 to 20 s; a safetensors folder takes one. The converted folder keeps the
values exactly (float32) and is named by the file's SHA-256, so that another file never meets an old conversion.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tunesmith.core.errors import ModelError
from tunesmith.core.files import MANIFEST, lock, require_space, sha256, whole_folder
from tunesmith.models.aliases import cache_folder

__all__ = ["converted_gguf"]


def converted_gguf(file: Path) -> Path:
    """Return a model folder with the weights and tokenizer of a GGUF ``file``, from the cache where it is there.

    Raises:
        ModelError: the file is no GGUF, is cut short, or its architecture is unknown to transformers.
        OutputError: the cache folder cannot be written.
    """
    target = cache_folder() / "gguf" / f"{file.stem}-{sha256(file)[:16]}"
    if (target / MANIFEST).is_file():
        return target
    # All processes of a distributed run come here at once: one converts, the others wait and find it done.
    with lock(target.parent / "lock"):
        if (target / MANIFEST).is_file():
            return target
        # float32 needs at most 8 times the bytes of a 4-bit file.
        require_space(target, 8 * file.stat().st_size, f"converting {file.name}")
        with whole_folder(target) as folder:
            _convert(file, folder)
    return target


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file (it does not begin with GGUF). Download or copy it again.")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise ModelError(f"{file} cannot be read as a GGUF model: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

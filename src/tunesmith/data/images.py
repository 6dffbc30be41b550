"""Images of rows: where rows hold them, and how they are opened.

An image is a PIL image, the path of a file, the bytes of one, or what ``datasets`` makes of its Image feature
(``{"bytes", "path"}``). A message shows it as a part of its content, ``{"type": "image", "image": ...}``; a part
without one marks the place of the next image of the row's column ``images`` (a list) or ``image``. Where no part shows
an image, ``<image>`` in a text marks such a place, as in LLaVA's and ShareGPT's rows. Nothing is ever fetched: a URL is
refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from tunesmith.core.errors import DataError, SettingsError
from tunesmith.data.readers import kind_of
from tunesmith.data.types import RowRefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Resize", "check_resize", "digest_of", "image_in", "images_of", "open_image", "place_images"]

Resize = int | tuple[int, int] | None
"""A longest side in pixels that larger images are scaled down to, an exact (width, height), or as they are."""

_ACCEPTED = "Give a PIL image, the path of a file, or the bytes of one."
_MARKER = "<image>"
_PLACE: dict[str, Any] = {"type": "image", "image": None}


def image_in(part: Mapping[str, Any]) -> Any:
    """Return the image of a content part of type image or image_url, None where the part only marks its place."""
    found = next((part[key] for key in ("image", "image_url", "url", "path") if _is_given(part.get(key))), None)
    if found is None and part.get("base64"):
        return part["base64"] if part["base64"].startswith("data:") else f"data:;base64,{part['base64']}"
    return found.get("url") if isinstance(found, Mapping) and "url" in found else found


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return what the columns ``images`` and ``image`` of a row hold."""
    several = row.get("images")
    several = list(several) if isinstance(several, (list, tuple)) else [several]
    given = [*several, row.get("image")]
    return [image for image in given if _is_given(image)]


def _is_given(image: Any) -> bool:
    return image is not None and not (isinstance(image, str) and not image)


def place_images(messages: list[dict[str, Any]], given: Sequence[Any]) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Return the messages with bare ``{"type": "image"}`` parts, and the images in the order of these parts.

    ``given`` are the images of the row, for the parts that have none of their own. Where no part shows an image, their
    places are the ``<image>`` of the texts, without any the start of the first user message; where all parts have their
    own, the messages speak for themselves.

    Raises:
        RowRefusedError: there are more or fewer of them than such places.
    """
    rest = list(given)
    if rest and not any(part["type"] == "image" for message in messages for part in _parts(message)):
        messages = _with_places(messages, len(rest))
    own = [part["image"] for message in messages for part in _parts(message) if part["type"] == "image"]
    marked = sum(image is None for image in own)
    if marked and len(rest) != marked:
        raise RowRefusedError(
            "images do not match", f"the messages mark {marked} places for images, and the row has {len(rest)} images"
        )
    bare = [
        {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in _parts(message)]}
        if _parts(message)
        else message
        for message in messages
    ]
    return bare, tuple(rest.pop(0) if image is None else image for image in own)


def _with_places(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return messages of text with a place at each ``<image>``, or with ``count`` of them before the first question."""
    texts = [message["content"] or "" for message in messages]
    if any(_MARKER in text for text in texts):
        contents = [_cut_at_markers(text) if _MARKER in text else None for text in texts]
    else:
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), 0)
        contents: list[Any] = [None] * len(messages)
        contents[first] = [_PLACE] * count + [{"type": "text", "text": texts[first]}]
    return [
        message if content is None else {**message, "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]


def _cut_at_markers(text: str) -> list[dict[str, Any]]:
    parts = [part for piece in text.split(_MARKER) for part in (_PLACE, {"type": "text", "text": piece})]
    return [part for part in parts[1:] if part.get("text") != ""]


def open_image(value: Any, where: str, *, resize: Resize = None) -> Image:
    """Return an image in RGB, turned as its camera says.

    Raises:
        DataError: it cannot be read, is a URL, or has pixels of no known range; the message names ``where``.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = _eight_bits(ImageOps.exif_transpose(_opened(value, where)), where).convert("RGB")
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        why = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{where}: an image cannot be read: {why}. {_ACCEPTED}") from error
    if isinstance(resize, tuple):
        return image.resize(resize, Image.Resampling.LANCZOS)
    if resize is not None and max(image.size) > resize:
        image.thumbnail((resize, resize), Image.Resampling.LANCZOS)
    return image


def check_resize(resize: Any) -> Resize:
    """Return ``resize`` if it is a :data:`Resize`.

    Raises:
        SettingsError: it is none.
    """
    numbers = resize if isinstance(resize, tuple) and len(resize) == 2 else (resize,)
    if resize is None or all(type(number) is int and number > 0 for number in numbers):
        return resize
    raise SettingsError(f"resize={resize!r} must be a longest side in pixels, a (width, height), or None.")


def digest_of(images: Sequence[Image]) -> bytes:
    """Return a hash of the pixels of images."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return digest.digest()


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message that shows images; none where its content is text."""
    content = message["content"]
    return content if isinstance(content, list) else []


def _opened(value: Any, where: str) -> Image:
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str) and value.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2], validate=True)))
    if isinstance(value, str) and value.startswith("file://"):
        value = url2pathname(urlsplit(value).path)
    if isinstance(value, str) and "://" in value[:10]:
        raise DataError(f"{where}: the image {value[:80]!r} is a URL, and nothing is fetched. {_ACCEPTED}")
    if isinstance(value, (str, os.PathLike)):
        return Image.open(value)
    raise DataError(f"{where}: an image is {kind_of(value)}. {_ACCEPTED}")


def _eight_bits(image: Image, where: str) -> Image:
    """Return ``image`` with at most 8 bits a channel: PIL would cut at 255 where it should scale."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{where}: an image has pixels of 32 bits (mode {image.mode!r}), which may lie in any range. Scale them to "
            "8 or 16 bits before training."
        )
    return image

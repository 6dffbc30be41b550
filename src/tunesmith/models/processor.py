"""The processor of a vision-language model: its tokenizer, and what makes numbers of images.

transformers refuses processors that know videos too where torchvision is not installed, although it makes numbers of
images without. There a subclass of the same name is made, whose part for videos only says what is missing.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from tunesmith.core.errors import ModelError
from tunesmith.core.versions import auto_image_processor

__all__ = ["ImagesOnly", "images_only", "load_processor"]


class ImagesOnly(BaseImageProcessor):
    """Stands for the video part of a processor; ``settings`` are that part's own and are saved as they were."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def preprocess(self, videos: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise ModelError("videos need the package torchvision. Install the build that belongs to the installed torch.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the part that this one stands for."""
        return dict(self.settings)


class _WithoutVideos(ProcessorMixin):
    """In front of a processor class of transformers, which looks for the class of videos even to refuse it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Take :class:`ImagesOnly` for the part for videos; the others are transformers' to check."""
        if isinstance(argument, ImagesOnly):
            return ImagesOnly
        return super().check_argument_for_proper_class(argument_name, argument)


@functools.cache
def images_only(kind: type) -> Any:
    """Return a subclass of a processor class, of the same name, that takes an :class:`ImagesOnly` for its videos."""
    # transformers reads the parts from the signature of the class itself.
    return type(kind.__name__, (_WithoutVideos, kind), {"__init__": kind.__init__, "__module__": __name__})


def load_processor(place: str, **hub: Any) -> Any:
    """Return the processor beside a vision-language model or an adapter on it.

    Raises:
        ModelError: the folder holds a tokenizer alone.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        processor = AutoProcessor.from_pretrained(place, **hub)
    except ImportError:
        if is_torchvision_available():
            raise
        processor = _without_videos(place, hub)
    if not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{place} holds a tokenizer and no processor for images (processor_config.json or "
            "preprocessor_config.json is missing). Copy the model whole, or load it for text with FastLanguageModel."
        )
    return processor


def _without_videos(place: str, hub: dict[str, Any]) -> Any:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    record, _ = ProcessorMixin.get_processor_dict(place, **hub)
    if "processor_class" in record:
        kind = getattr(transformers, record["processor_class"])
    else:  # older folders name it nowhere
        kind = transformers.PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(place, **hub))]
    images = auto_image_processor().from_pretrained(place, **hub)
    # The name that transformers too would look for.
    videos = {"video_processor_type": type(images).__name__.removesuffix("Pil").replace("Image", "Video")}
    parts = {
        "image_processor": images,
        "tokenizer": AutoTokenizer.from_pretrained(place, **hub),
        "video_processor": ImagesOnly(record.get("video_processor") or videos),
    }
    unknown = [name for name in kind.get_attributes() if name not in parts]
    if unknown:
        raise ModelError(f"the processor of {place} has a part {unknown[0]}, which needs the package torchvision here.")
    return images_only(kind).from_args_and_dict([parts[name] for name in kind.get_attributes()], record)

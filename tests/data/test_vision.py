"""Rows with images: where images are found, what is masked, and what a batch holds."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny, tiny_vision
from tests.tiny_vision import colour_rows, image, vision_processor

from tunesmith.core.errors import DataError, ModelError, SettingsError
from tunesmith.data.formats import to_example
from tunesmith.data.images import check_resize, open_image
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.prepare import DocumentDataset, prepare, split_documents
from tunesmith.data.types import Conversation, Document, RowRefusedError, SourceRow
from tunesmith.data.vision import ImageCollator, VisionEncoder

FAMILIES = pytest.mark.parametrize("family", tiny_vision.FAMILIES)
ANSWER = {"role": "assistant", "content": "red"}
PLACE = {"type": "image"}


def row(*content: Any, answer: Any = "red", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}], **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def shown(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": value}


def example(value: dict[str, Any]) -> Conversation:
    found = to_example(SourceRow(value, "rows:1"))
    assert isinstance(found, Conversation)
    return found


def encoded(family: str, value: dict[str, Any], **settings: Any) -> Document:
    (document,) = VisionEncoder(vision_processor(family), **settings).encode(example(value))
    return document


def trained_text(family: str, document: Document) -> str:
    return str(vision_processor(family).tokenizer.decode(document.input_ids[document.trained]))


def image_tokens(family: str, document: Document) -> np.ndarray:
    processor = vision_processor(family)
    tokenizer = processor.tokenizer
    names = ["<|image_pad|>"] if family == "qwen2-vl" else ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    return np.isin(document.input_ids, tokenizer.convert_tokens_to_ids(names))


# --- where rows hold images -------------------------------------------------------------------------------------------


def test_images_come_in_the_order_of_their_places() -> None:
    red, blue = image("red"), image("blue")
    found = example(row(shown(red), text("and"), {"type": "image_url", "image_url": {"url": "blue.png"}}))
    assert found.images == (red, "blue.png")
    assert found.messages[0]["content"] == [PLACE, text("and"), PLACE]
    assert example(row(PLACE, text("and"), PLACE, images=[red, blue])).images == (red, blue)
    assert example(row(shown(red), text("a"), image=blue)).images == (red,)  # its own goes before the column


def test_images_of_the_row_come_first_where_no_message_shows_them() -> None:
    found = example({"messages": [{"role": "user", "content": "which colour"}, ANSWER], "image": "red.png"})
    assert found.images == ("red.png",)
    assert found.messages[0]["content"] == [PLACE, text("which colour")]


def test_markers_in_texts_are_the_places_of_the_images_of_the_row() -> None:
    """As LLaVA's rows have them; a text that says so beside a part with an image, or without images, is text."""
    pair = {"conversations": [{"from": "human", "value": "<image>\nthe colour"}, {"from": "gpt", "value": "red"}]}
    assert example({**pair, "image": "a.png"}).messages[0]["content"] == [PLACE, text("\nthe colour")]
    value = {"messages": [{"role": "user", "content": "first <image> second<image>"}, ANSWER,
                          {"role": "user", "content": "and <image>?"}, ANSWER], "images": ["a", "b", "c"]}  # fmt: skip
    found = example(value)
    assert found.images == ("a", "b", "c")
    assert found.messages[0]["content"] == [text("first "), PLACE, text(" second"), PLACE]
    assert found.messages[2]["content"] == [text("and "), PLACE, text("?")]
    assert found.messages[1]["content"] == "red"
    own = example(row(shown("a.png"), text("an <image> tag")))
    assert own.messages[0]["content"] == [PLACE, text("an <image> tag")]
    plain = example({"messages": [{"role": "user", "content": "an <image> tag"}, ANSWER]})
    assert (plain.messages[0]["content"], plain.images) == ("an <image> tag", ())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (row(text("<image> <image>"), image="a.png"), "images do not match"),
        (row(text("<image>"), images=["a.png", "b.png"]), "images do not match"),
        (row(PLACE, text("a")), "images do not match"),
        (row(PLACE, text("a"), images=["a.png", "b.png"]), "images do not match"),
        (row({"type": "video", "video": "a.mp4"}), "content is not text"),
        ({"prompt": "a", "completion": "b", "image": "a.png"}, "images beside plain text"),
        ({"text": "a", "images": ["a.png"]}, "images beside plain text"),
        (row(shown("a.png"), answer=[text(" ")]), "empty answer"),
    ],
)
def test_rows_that_are_refused(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefusedError) as caught:
        to_example(SourceRow(value, "rows:1"))
    assert caught.value.reason == reason


def test_a_tokenizer_alone_reads_no_images() -> None:
    with pytest.raises(RowRefusedError, match=r"has 1 images, and the tokenizer alone reads text.*FastVisionModel"):
        ExampleEncoder(tiny.tiny_tokenizer()).encode(example(row(shown(image("red")), text("a"))))


def as_bytes(colour: str) -> bytes:
    out = io.BytesIO()
    image(colour).save(out, "PNG")
    return out.getvalue()


def test_images_are_opened_from_all_that_rows_hold(tmp_path: Path) -> None:
    raw = as_bytes("red")
    (tmp_path / "red.png").write_bytes(raw)
    data_url = "data:image/png;base64," + base64.b64encode(raw).decode()
    path = str(tmp_path / "red.png")
    ways = [image("red"), path, tmp_path / "red.png", raw, {"bytes": raw, "path": None}, {"path": path}, data_url,
            (tmp_path / "red.png").as_uri()]  # fmt: skip
    parts = [{"base64": data_url}, {"base64": data_url.partition(",")[2]}, {"image": image("red")}]
    ways += [example(row({"type": "image", **part}, text("a"))).images[0] for part in parts]
    opened = [open_image(way, "rows:1") for way in ways]
    assert {one.tobytes() for one in opened} == {image("red").tobytes()}
    assert {one.mode for one in opened} == {"RGB"}


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    wide = image("red", size=(32, 16))
    turned = wide.getexif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    wide.save(tmp_path / "a.png", exif=turned)
    found = open_image(str(tmp_path / "a.png"), "rows:1")
    assert found.size == (16, 32)
    assert found.tobytes() == wide.rotate(-90, expand=True).tobytes()


def test_pixels_of_more_than_8_bits_are_scaled_or_refused(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 256, 128 * 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    for value in (Image.fromarray(deep), tmp_path / "a.png"):
        assert np.asarray(open_image(value, ""))[0, :, 0].tolist() == [0, 1, 0, 128, 255]
    for kind in (np.float32, np.int32):
        with pytest.raises(DataError, match=r"rows:1: an image has pixels of 32 bits .*Scale them to 8 or 16 bits"):
            open_image(Image.fromarray(np.ones((4, 4), kind)), "rows:1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "https://example.org/a.png",
            r"^rows:1: the image 'https://example.org/a.png' is a URL, and nothing is fetched\. Give a PIL [^.]*\.$",
        ),
        ("no/such.png", r"rows:1: an image cannot be read: .*No such file"),
        (b"nothing", "rows:1: an image cannot be read: it is no image of a known format. Give a PIL image"),
        ("data:image/png;base64,*", "rows:1: an image cannot be read"),
        (np.zeros((4, 4, 3), np.uint8), "rows:1: an image is a ndarray. Give a PIL image"),
        (3, "rows:1: an image is a number. Give a PIL image, the path of a file, or the bytes of one"),
    ],
)
def test_an_image_that_cannot_be_read_names_its_row(value: Any, message: str) -> None:
    (held,) = example(row(shown(value), text("a"))).images
    with pytest.raises(DataError, match=message):
        open_image(held, "rows:1")


def test_an_image_that_the_processor_refuses_names_its_row(tmp_path: Path) -> None:
    """Qwen's takes no image that is 200 times as wide as it is high."""
    wide = image("red", size=(900, 3))
    with pytest.raises(DataError, match=r"rows:1: the processor refuses an image: .*ratio.* Crop or resize it"):
        encoded("qwen2-vl", row(shown(wide), text("a")))
    image("red").save(tmp_path / "a.png")
    rows = features("qwen2-vl", [row(shown(str(tmp_path / "a.png")), text("a"))])
    wide.save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"row 1.*: the processor refuses an image"):
        ImageCollator(vision_processor("qwen2-vl"))(rows)


def test_a_run_stops_at_an_image_that_cannot_be_read() -> None:
    rows = [row(shown(image("red")), text("a")), row(shown("gone.png"), text("a"))]
    with pytest.raises(DataError, match=r"row 2.*an image cannot be read|\[1\].*an image cannot be read"):
        prepare(rows, VisionEncoder(vision_processor("gemma3")), max_length=100)


def test_resizing() -> None:
    large = image("red", size=(64, 32))
    assert open_image(large, "", resize=16).size == (16, 8)
    assert open_image(large, "", resize=100).size == (64, 32)
    assert open_image(large, "", resize=(20, 10)).size == (20, 10)
    assert large.size == (64, 32)  # the user's own image is left alone
    for wrong in ("min", 0, (1, 2, 3), True):
        with pytest.raises(SettingsError, match="must be a longest side in pixels"):
            check_resize(wrong)


# --- masks ------------------------------------------------------------------------------------------------------------


@FAMILIES
def test_answers_train_and_images_never_do(family: str) -> None:
    value = row(shown(image("red")), text("the colour"), shown(image("blue", size=(24, 16))))
    document = encoded(family, value)
    assert trained_text(family, document) == "red<|im_end|>"
    places = image_tokens(family, document)
    assert places.sum() >= 4
    everything = encoded(family, value, train_on="all")
    assert not (everything.trained & image_tokens(family, everything)).any()
    assert everything.trained.sum() > 20


@FAMILIES
def test_an_image_in_an_answer_carries_no_loss(family: str) -> None:
    value = row(text("draw"), answer=[text("look "), shown(image("red")), text(" red")])
    document = encoded(family, value)
    assert not (document.trained & image_tokens(family, document)).any()
    assert trained_text(family, document).startswith("look")
    assert "red<|im_end|>" in trained_text(family, document)


@FAMILIES
def test_token_ids_are_those_of_the_processor(family: str) -> None:
    """One call of the processor on the messages, as users make it for generation."""
    processor = vision_processor(family)
    for value in colour_rows(3, size=(24, 16)):
        document = encoded(family, value)
        own = processor.apply_chat_template(value["messages"], tokenize=True, return_dict=True)
        assert document.input_ids.tolist() == own["input_ids"][0]
        prompt = processor.apply_chat_template(
            value["messages"][:1], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"][0]
        assert int(np.flatnonzero(document.trained)[0]) == len(prompt)


@FAMILIES
def test_text_alone_is_masked_as_its_tokenizer_would(family: str) -> None:
    processor = vision_processor(family)
    for value in [*tiny.chat_rows(6), {"text": "the cat sat"}, {"prompt": "the cat ", "completion": "sat"}]:
        found = VisionEncoder(processor).encode(to_example(SourceRow(value, "rows:1")))
        expected = ExampleEncoder(processor.tokenizer).encode(to_example(SourceRow(value, "rows:1")))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.input_ids.tolist() == theirs.input_ids.tolist()
            assert ours.trained.tolist() == theirs.trained.tolist()
            assert ours.images is None


@FAMILIES
def test_flags_and_the_last_answer(family: str) -> None:
    first = row(shown(image("red")), text("a"))["messages"]
    value = {"messages": [*first, *row(text("b"), answer="blue")["messages"]]}
    assert trained_text(family, encoded(family, value)) == "red<|im_end|>blue<|im_end|>"
    assert trained_text(family, encoded(family, value, train_on="last")) == "blue<|im_end|>"
    value["messages"][1]["train"] = False
    assert trained_text(family, encoded(family, value)) == "blue<|im_end|>"


@FAMILIES
def test_answers_found_by_markers_are_the_same(family: str) -> None:
    value = row(shown(image("red")), text("the colour"))
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    assert encoded(family, value, **parts).trained.tolist() == encoded(family, value).trained.tolist()


@pytest.mark.parametrize("words", ["<|image_pad|>", "<|im_end|>"])
def test_control_tokens_in_text_are_refused(words: str) -> None:
    with pytest.raises(RowRefusedError, match="would read as a control token"):
        encoded("qwen2-vl", row(shown(image("red")), text(f"a {words}")))


def test_a_template_that_shows_no_images_is_refused() -> None:
    processor = vision_processor("gemma3")
    template = processor.chat_template
    processor.chat_template = template.replace("<start_of_image>", "")
    with pytest.raises(RowRefusedError, match="writes 0 places for the 1 images of the row"):
        VisionEncoder(processor).encode(example(row(shown(image("red")), text("a"))))
    processor.chat_template = tiny.tiny_tokenizer().chat_template
    with pytest.raises(RowRefusedError, match="the chat template refuses the row"):
        VisionEncoder(processor).encode(example(row(shown(image("red")), text("a"))))
    # It takes text as text, and rows of text alone go on.
    (document,) = VisionEncoder(processor).encode(example(tiny.chat_rows(1)[0]))
    assert document.trained.any()


def test_a_processor_that_names_no_image_token() -> None:
    processor = vision_processor("gemma3")
    processor.image_token = None
    with pytest.raises(ModelError, match="does not say which tokens stand for an image"):
        VisionEncoder(processor)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_too_long", ["drop", "truncate"])
def test_rows_that_are_too_long_are_counted_and_never_cut_through_an_image(on_too_long: Any) -> None:
    rows = [row(shown(image("red")), text("a")), row(*[shown(image("red"))] * 4, text("a"))]
    data = prepare(rows, VisionEncoder(vision_processor("gemma3")), max_length=50, on_too_long=on_too_long)
    assert (data.ledger.rows_in, data.ledger.rows_kept) == (2, 1)
    (reason,) = data.ledger.dropped
    assert reason.startswith("longer than 50 tokens")
    assert ("with images" in reason) == (on_too_long == "truncate")


def test_rows_of_equal_text_and_other_images_are_other_rows() -> None:
    encoder = VisionEncoder(vision_processor("gemma3"))
    rows = [row(shown(image("red", seed=seed)), text("a")) for seed in range(40)]
    data = prepare([*rows, rows[0]], encoder, max_length=100)
    assert data.ledger.duplicates == 1
    train, held_out = split_documents(data, fraction=0.1)
    assert held_out is not None
    assert len(train.rows) + len(held_out.rows) == 41
    other = prepare([row(shown(image("blue")), text("a"))], encoder, max_length=100)
    assert other.fingerprint() != prepare(rows[:1], encoder, max_length=100).fingerprint()


# --- batches ----------------------------------------------------------------------------------------------------------


def features(family: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    data = prepare(rows, VisionEncoder(vision_processor(family)), max_length=200)
    dataset = DocumentDataset(data.documents)
    return [dataset[index] for index in range(len(dataset))]


@FAMILIES
def test_a_batch_holds_what_each_row_holds_alone(family: str) -> None:
    """Images of several sizes, two in one row, none in another: logits of the rows are those of the rows alone."""
    one, two, three = colour_rows(1, size=(16, 16)) + colour_rows(1, seed=1, size=(32, 24)) + tiny.chat_rows(1)
    two["messages"][0]["content"].append(shown(image("blue", size=(24, 16))))
    join = ImageCollator(vision_processor(family))
    rows = features(family, [one, two, three])
    model = tiny_vision.vision_model(family).eval()

    def logits(batch: dict[str, Any]) -> torch.Tensor:
        given = {name: value for name, value in batch.items() if name not in ImageCollator.OWN}
        return model(**given).logits.flatten(0, 1)[batch["rows"]]

    together = join(rows)
    assert together["tokens"] == sum(together["lengths"]) < together["input_ids"].numel()
    alone = torch.cat([logits(join([feature])) for feature in rows])
    assert torch.equal(together["targets"], torch.cat([join([feature])["targets"] for feature in rows]))
    torch.testing.assert_close(logits(together), alone, rtol=1e-4, atol=1e-4)


def test_a_width_is_rounded_up() -> None:
    rows = features("gemma3", colour_rows(3))
    batch = ImageCollator(vision_processor("gemma3"), multiple=16)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["attention_mask"].sum() == batch["tokens"]


def test_an_image_that_changed_since_is_noticed(tmp_path: Path) -> None:
    image("red", size=(32, 32)).save(tmp_path / "a.png")
    rows = features("qwen2-vl", [row(shown(str(tmp_path / "a.png")), text("a"))])
    image("red", size=(16, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="its images are no longer those that were read before the run"):
        ImageCollator(vision_processor("qwen2-vl"))(rows)

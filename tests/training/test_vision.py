"""Training vision-language models: gradients where they are asked for, sums that do not depend on batches, reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny, tiny_vision
from tests.tiny_vision import colour_rows, vision_model, vision_processor
from tests.training.support import trainable

from tunesmith import FastVisionModel, SFTConfig, SFTTrainer, VisionDataCollator, train_on_responses_only
from tunesmith.adapters.parts import places_of
from tunesmith.core.errors import DataError, ModelError, NotSupportedYetError, SettingsError, TrainingError
from tunesmith.models.load import facts_of
from tunesmith.training.checkpoint import checkpoints_in

FAMILIES = pytest.mark.parametrize("family", tiny_vision.FAMILIES)


def adapted(family: str, **adapter: Any) -> Any:
    return FastVisionModel.get_peft_model(
        vision_model(family), **{"r": 4, "use_gradient_checkpointing": False, **adapter}
    )


def trainer(folder: Path, family: str = "gemma3", *, model: Any = None, rows: Any = 8, **settings: Any) -> SFTTrainer:
    """Return a trainer, called as scripts for vision models call it."""
    model = adapted(family) if model is None else model
    processor = vision_processor(family)
    own = {name: settings.pop(name) for name in ("data_collator", "processing_class", "eval_dataset", "formatting_func")
           if name in settings}  # fmt: skip
    own = {"data_collator": VisionDataCollator(model, processor), "processing_class": processor, **own}
    own = {name: value for name, value in own.items() if value is not None}
    args = SFTConfig(
        output_dir=str(folder),
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "eval_split": 0,
           "remove_unused_columns": False, "dataset_text_field": "", "max_length": 128, "save_strategy": "no",
           "disable_tqdm": True, "use_cpu": True, **settings},
    )  # fmt: skip
    rows = colour_rows(rows) if isinstance(rows, int) else rows
    return SFTTrainer(model, args, rows, **own)


def losses(made: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


# --- gradients --------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("off", "part", "kind"),
    [
        ({"finetune_language_layers": False}, {"vision"}, {"attention", "mlp"}),
        ({"finetune_vision_layers": False}, {"language"}, {"attention", "mlp"}),
        ({"finetune_mlp_modules": False}, {"vision", "language"}, {"attention"}),
        ({"finetune_attention_modules": False}, {"vision", "language"}, {"mlp"}),
    ],
    ids=["vision", "language", "attention", "mlp"],
)
def test_gradients_arrive_exactly_where_they_are_asked_for(
    off: Any, part: set[str], kind: set[str], family: str, tmp_path: Path
) -> None:
    model = adapted(family, **off)
    made = trainer(tmp_path, family, model=model, rows=2)
    loss = made.head.loss(next(iter(made.get_train_dataloader())), 1.0)
    loss.backward()
    places = places_of(vision_model(family))
    expected = {name for name, place in places.items() if place.part in part and place.kind in kind}
    found = {
        name.removeprefix("base_model.model.").partition(".lora_B")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any() and "lora_B" in name
    }
    assert found == expected
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


@FAMILIES
def test_checkpointing_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    def gradients(mode: bool | str) -> dict[str, torch.Tensor]:
        model = adapted(family, use_gradient_checkpointing=mode)
        made = trainer(tmp_path, family, model=model, rows=2)
        model.train()
        made.head.loss(next(iter(made.get_train_dataloader())), 1.0).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    plain, recomputed = gradients(False), gradients("unsloth")
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_the_loss_is_that_of_the_model_itself(family: str, tmp_path: Path) -> None:
    """Ours over hidden states of trained rows, transformers' over all logits and labels."""
    model = adapted(family)
    made = trainer(tmp_path, family, model=model, rows=4)
    batch = next(iter(made.get_train_dataloader()))
    collator = VisionDataCollator(model, vision_processor(family))
    order = [int(place.split()[-1]) - 1 for place in batch["where"]]
    given = collator([colour_rows(4)[index] for index in order])
    assert (given["labels"] != -100).sum() == len(batch["rows"])
    own = model(**given).loss
    torch.testing.assert_close(made.head.loss(batch, float(len(batch["rows"]))), own, rtol=1e-4, atol=1e-5)
    assert made.head.reasons == []


def test_a_batch_however_it_is_split_gives_the_same_weights(tmp_path: Path) -> None:
    """Tokens are counted over the whole step, rows of very different length included."""
    rows = colour_rows(4) + tiny.chat_rows(4)
    results = []
    for name, size in (("together", 8), ("split", 2), ("alone", 1)):
        made = trainer(tmp_path / name, rows=rows, per_device_train_batch_size=size,
                       gradient_accumulation_steps=8 // size, max_steps=2)  # fmt: skip
        made.train()
        results.append((trainable(made.model), losses(made)))
    for weights, found in results[1:]:
        assert found == pytest.approx(results[0][1], rel=1e-4)
        for key, value in weights.items():
            torch.testing.assert_close(value, results[0][0][key], rtol=1e-3, atol=1e-4)


def test_a_first_step_of_text_alone_proves_nothing_about_what_sees(tmp_path: Path) -> None:
    rows = tiny.chat_rows(2) + colour_rows(2)
    made = trainer(tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=4)
    made.train()
    assert made._proved_gradients


def test_a_tower_that_the_loss_does_not_reach_stops_the_run(tmp_path: Path) -> None:
    model = adapted("gemma3")
    model.get_base_model().model.multi_modal_projector.mm_input_projection_weight.data.zero_()
    with pytest.raises(TrainingError, match=r"lora_B weights got no gradient.*vision_tower"):
        trainer(tmp_path, model=model).train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = adapted("qwen2-vl")
    model.get_base_model().lm_head.weight.data[5] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss is not finite in step 1, rows"):
        trainer(tmp_path, "qwen2-vl", model=model).train()


# --- what is learned, saved and loaded --------------------------------------------------------------------------------


def answer(model: Any, processor: Any, row: dict[str, Any]) -> str:
    """Return what the model says of the image of a row, through the processor as users call it."""
    prompt = processor.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id)
    return str(processor.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=pytest.mark.slow), "qwen2-vl"])
def test_a_model_learns_to_name_the_colour_of_an_image(family: str, tmp_path: Path) -> None:
    """Only pixels tell the colour: held-out images are named rightly after reload, in plain PEFT too."""
    from peft import PeftModel

    tiny_vision.save_vision_model(tmp_path / "base", family)
    base, processor = FastVisionModel.from_pretrained(str(tmp_path / "base"), dtype="float32")
    model = FastVisionModel.get_peft_model(base, r=8, use_gradient_checkpointing=False)
    made = SFTTrainer(
        model=model,
        train_dataset=colour_rows(32),
        processing_class=processor.tokenizer,
        data_collator=VisionDataCollator(model, processor),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=8, gradient_accumulation_steps=1,
            max_steps=32, learning_rate=1e-2, eval_split=0, save_strategy="no", disable_tqdm=True, max_length=128,
            remove_unused_columns=False, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )  # fmt: skip
    made.train()
    assert losses(made)[-1] < 0.3 * losses(made)[0]
    FastVisionModel.for_inference(model)
    unseen = colour_rows(12, seed=1)
    said = [answer(model, processor, row) for row in unseen]
    right = [row["messages"][1]["content"][0]["text"] for row in unseen]
    assert sum(a == b for a, b in zip(said, right, strict=True)) >= 11  # by chance 4

    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    batch = VisionDataCollator(model, processor)(unseen[:3])
    again, its_processor = FastVisionModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    FastVisionModel.for_inference(again)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        plain = PeftModel.from_pretrained(vision_model(family), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert answer(again, its_processor, unseen[0]) == said[0]
    FastVisionModel.for_training(again)
    assert again.training


def test_a_checkpoint_holds_the_processor_and_a_run_goes_on_bit_equal(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rows": 8}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    broken = trainer(tmp_path / "broken", **settings)
    broken.add_callback(stop_at(2))
    broken.train()
    (checkpoint,) = checkpoints_in(tmp_path / "broken")
    assert (checkpoint / "processor_config.json").is_file()
    assert json.loads((checkpoint / "run.json").read_text())["plan"]["peak"] == 0
    resumed = trainer(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, value in trainable(straight.model).items():
        assert torch.equal(value, trainable(resumed.model)[name]), name


def stop_at(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop |= state.global_step >= step
            return control

    return Stop()


# --- rows, and what is refused ----------------------------------------------------------------------------------------


def test_rows_are_counted_and_evaluated(tmp_path: Path) -> None:
    long = colour_rows(1)[0]
    long["messages"][0]["content"].append({"type": "text", "text": "the cat " * 60})
    made = trainer(tmp_path, rows=[*colour_rows(4), long], eval_dataset=colour_rows(3, seed=4))
    assert (made.ledger.rows_in, made.ledger.rows_kept) == (5, 4)
    assert made.ledger.dropped == {"longer than 128 tokens": 1}
    assert made.evaluate()["eval_tokens"] > 0


def test_text_alone_trains_on_a_model_that_sees(tmp_path: Path) -> None:
    """As scripts do with FastModel: the processor as tokenizer, rows of text, vision layers off."""
    model = adapted("gemma3", finetune_vision_layers=False)
    made = trainer(tmp_path, model=model, rows=tiny.chat_rows(8), data_collator=None, max_steps=3)
    made = train_on_responses_only(made, "<|im_start|>user\n", "<|im_start|>assistant\n")
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    tokenizer = vision_processor("gemma3").tokenizer
    alone = trainer(tmp_path / "b", rows=tiny.chat_rows(4), data_collator=None, processing_class=tokenizer, max_steps=1)
    alone.train()
    assert len(losses(alone)) == 1


def test_a_processor_is_enough(tmp_path: Path) -> None:
    made = trainer(tmp_path, data_collator=None, rows=4)
    assert made.train_data.documents[0].images is not None
    assert facts_of(made.model).checkpointing is False
    assert made.plan.reason == "what images need is not predicted yet"


def test_a_collator_trains_every_token_but_those_of_images_when_asked(tmp_path: Path) -> None:
    model, processor = adapted("gemma3"), vision_processor("gemma3")
    everything = VisionDataCollator(model, processor, train_on_responses_only=False)
    made = trainer(tmp_path, model=model, data_collator=everything, processing_class=processor.tokenizer)
    assert made.args.train_on == "all"
    document = made.train_data.documents[0]
    assert document.trained.sum() == len(document) - 1 - 10  # of an image: begin, four tokens, end, and four newlines
    assert made.processing_class is processor


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"packing": True},
            SettingsError,
            "packing=True fills bins with text; rows of a vision-language model are padded",
        ),
        ({"neftune_noise_alpha": 5.0}, NotSupportedYetError, "neftune_noise_alpha on a vision-language model"),
        ({"data_collator": dict}, SettingsError, "data_collator is a type: the trainer joins documents itself"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, SettingsError, "takes only .'skip_prepare_dataset': True"),
        ({"train_on": "all"}, SettingsError, "train_on='all' in args, but the VisionDataCollator has 'assistant'"),
        ({"processing_class": tiny.tiny_tokenizer()}, SettingsError, "has another processor than the trainer"),
    ],
)
def test_what_the_trainer_refuses(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, **settings)


def test_dataset_kwargs_mean_nothing_without_images(tmp_path: Path) -> None:
    from tests.training import support

    with pytest.raises(SettingsError, match="the trainer prepares rows itself"):
        support.trainer(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"instruction_part": "a"}, SettingsError, "response_part"),
        ({"last_response_only": True, "train_on_responses_only": False}, SettingsError, "trains one answer"),
        ({"resize": "max"}, SettingsError, "resize='max' must be a longest side in pixels"),
        ({"ignore_index": 0}, SettingsError, "labels without loss are -100"),
        ({"formatting_func": str}, SettingsError, "give it to SFTTrainer"),
        ({"pad_to_multiple": 8}, TypeError, "Did you mean 'pad_to_multiple_of'"),
    ],
)
def test_what_the_collator_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VisionDataCollator(vision_model("gemma3"), vision_processor("gemma3"), **arguments)


def test_the_collator_takes_what_asks_for_nothing() -> None:
    nothing = {"resize": "min", "ignore_index": -100, "completion_only_loss": True, "formatting_func": None}
    collators = [
        VisionDataCollator(vision_model("gemma3"), vision_processor("gemma3"), **arguments)
        for arguments in (nothing, {})
    ]
    ours, plain = (collator(colour_rows(2)) for collator in collators)
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


def test_the_collator_wants_a_model_and_a_processor_that_see() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM is no vision-language model"):
        VisionDataCollator(tiny.tiny_model(), vision_processor("gemma3"))
    with pytest.raises(ModelError, match=r"knows no images. Give the processor that FastVisionModel"):
        VisionDataCollator(vision_model("gemma3"), tiny.tiny_tokenizer())


def test_a_collator_alone_names_the_row_that_it_cannot_use() -> None:
    collator = VisionDataCollator(vision_model("gemma3"), vision_processor("gemma3"), max_seq_length=20)
    with pytest.raises(DataError, match=r"row 0 of the batch: \d+ tokens, max_seq_length is 20"):
        collator(colour_rows(1))
    with pytest.raises(DataError, match="row 1 of the batch: the row has the keys 'a'"):
        VisionDataCollator(vision_model("gemma3"), vision_processor("gemma3"))([*colour_rows(1), {"a": 1}])

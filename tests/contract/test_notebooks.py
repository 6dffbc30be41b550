"""What scripts for Unsloth and TRL write around the training runs with the import lines changed, or says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tests import tiny
from tests.training import support
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tunesmith import (
    FastLanguageModel,
    FastModel,
    SFTConfig,
    SFTTrainer,
    get_chat_template,
    is_bf16_supported,
    is_bfloat16_supported,
    standardize_data_formats,
    standardize_sharegpt,
    train_on_responses_only,
)
from tunesmith.core.errors import AdapterError, DataError, ModelError, NotSupportedYetError, SettingsError
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.models.load import facts_of

PROMPT = "### Instruction: {} ### Response: {}"
ALPACA = [
    {"instruction": "the cat", "input": "", "output": "sat"},
    {"instruction": "the dog", "input": "", "output": "ran"},
] * 4


def texts_of(trainer: Any) -> list[str]:
    return [tiny.tiny_tokenizer().decode(document.input_ids) for document in trainer.train_data.documents]


# ---- formatting functions and columns that scripts make themselves ----


def batched(rows: Any) -> list[str]:
    return [PROMPT.format(a, b) for a, b in zip(rows["instruction"], rows["output"], strict=True)]


def batched_by_number(rows: Any) -> list[str]:
    return [PROMPT.format(rows["instruction"][i], rows["output"][i]) for i in range(len(rows["instruction"]))]


@pytest.mark.parametrize(
    "function",
    [
        batched,
        batched_by_number,
        lambda rows: {"text": batched(rows)},
        lambda row: PROMPT.format(row["instruction"], row["output"]),
        lambda row: [PROMPT.format(row["instruction"], row["output"])],
        lambda row: {"text": PROMPT.format(row["instruction"], row["output"])},
    ],
)
def test_a_formatting_function_of_rows_or_of_batches(function: Any, tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=Dataset.from_list(ALPACA), formatting_func=function)
    assert [text.split("<|")[0] for text in texts_of(trainer)] == [
        PROMPT.format(row["instruction"], row["output"]) for row in ALPACA
    ]


def test_several_texts_of_a_row_stay_several(tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path, rows=ALPACA, formatting_func=lambda row: [row["instruction"], row["output"]])
    assert len(trainer.train_data.documents) == 2 * len(ALPACA)


def test_a_text_that_a_script_made_goes_before_what_it_was_made_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "text": PROMPT.format(row["instruction"], row["output"])} for row in ALPACA]
    for given in (rows, Dataset.from_list(rows)):
        caplog.clear()
        assert texts_of(support.trainer(tmp_path, rows=given))[0].startswith("### Instruction: the cat")
        assert "the rows have a column text, which is trained on as it is" in caplog.text
    chats = [{**row, "text": "rendered"} for row in tiny.chat_rows(4)]
    assert not texts_of(support.trainer(tmp_path, rows=chats))[0].startswith("rendered")


def test_rows_that_are_tokenized_and_masked_stay_so(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in ("the cat sat", "the dog ran home")]
    rows = [{"text": "unused", "input_ids": own, "labels": [-100, -100, *own[2:]]} for own in ids]
    padded = [
        {"input_ids": [*row["input_ids"], 0, 0], "labels": [*row["labels"], -100, -100],
         "attention_mask": [1] * len(row["input_ids"]) + [0, 0]}
        for row in rows
    ]  # fmt: skip
    masked = [{"input_ids": own, "completion_mask": [0, 0] + [1] * (len(own) - 2)} for own in ids]
    for given in (
        rows,
        Dataset.from_list(rows),
        Dataset.from_list(padded),
        masked,
        Dataset.from_list(rows).with_format("torch"),
    ):
        documents = support.trainer(tmp_path, rows=given).train_data.documents
        assert [document.input_ids.tolist() for document in documents] == ids
        assert [document.trained.tolist() for document in documents] == [
            [False, False] + [True] * (len(own) - 2) for own in ids
        ]
    whole = support.trainer(tmp_path, rows=[{"input_ids": own} for own in ids]).train_data.documents
    assert all(document.trained.all() for document in whole)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": [3, 4, 5], "labels": [4, 5, -100]},
            r"labels\[0\] is 4 and input_ids\[0\] 3; a label is its own",
        ),
        ({"input_ids": [3, 4, 5], "labels": [3]}, "labels has 1 entries and input_ids 3"),
        ({"input_ids": [[3, 4]]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": ["a", "b"]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [3]}, "must hold two tokens or more"),
    ],
)
def test_tokens_that_cannot_be_trained_on(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        support.trainer(tmp_path, rows=[row])


def test_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"row 1: token {tiny.VOCABULARY}, and the model has embeddings for"):
        support.trainer(tmp_path, rows=[{"input_ids": [3, tiny.VOCABULARY]}])


# ---- arguments of other trainers ----


def test_arguments_that_ask_for_what_is_done_anyway(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    for collator in (DataCollatorForSeq2Seq(tokenizer), DataCollatorForLanguageModeling(tokenizer, mlm=False), None):
        trainer = support.trainer(
            tmp_path, rows=8, data_collator=collator, dataset_num_proc=2, compute_metrics=None, peft_config=None,
            padding_free=False, loss_type="nll", packing_strategy="bfd", eval_packing=False, max_steps=1,
        )  # fmt: skip
    train_on_responses_only(trainer, num_proc=1).train()
    assert SFTConfig(completion_only_loss=True).train_on == "assistant"
    assert SFTConfig(assistant_only_loss=False).train_on == "all"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_config": object()}, "make the adapter before the trainer"),
        ({"compute_metrics": print}, "Score answers with tunesmith.evaluation.evaluate"),
        ({"eval_dataset": {"a": [], "b": []}}, "eval_dataset has 2 data sets by name"),
        ({"data_collator": DataCollatorForLanguageModeling(tiny.tiny_tokenizer(), mlm=False)}, None),
        ({"loss_type": "dft"}, "loss_type='dft': the loss is the negative log-likelihood"),
        ({"eval_packing": True}, "rows to evaluate on are not packed"),
        ({"packing_strategy": "wrapped"}, "whole documents, best fit first"),
        ({"eos_token": "</s>"}, "set it on the tokenizer"),
        ({"assistant_only_loss": True, "train_on": "all"}, "ask for train_on='assistant', which is 'all'"),
    ],
)
def test_arguments_that_ask_for_something_else_say_what_to_do(
    arguments: Any, message: str | None, tmp_path: Path
) -> None:
    if message is None:
        support.trainer(tmp_path, **arguments)
        return
    with pytest.raises(SettingsError, match=message):
        support.trainer(tmp_path, **arguments)


def test_arguments_of_train_on_responses_only(tmp_path: Path) -> None:
    rows = [{"text": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n" * 2}] * 4
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    counts = []
    for last in (False, True):
        trainer = support.trainer(tmp_path, rows=rows)
        train_on_responses_only(
            trainer, **parts, force_match=False, tokenizer=tokenizer, return_function=False, last_response_only=last
        )
        counts.append([int(document.trained.sum()) for document in trainer.train_data.documents])
    assert counts[0] == [2 * count for count in counts[1]] and all(counts[1])
    with pytest.raises(SettingsError, match="the trainer's own rows are masked, by no function"):
        train_on_responses_only(trainer, return_function=True)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(SettingsError, match="tokenizer has other tokens than the trainer's"):
        train_on_responses_only(trainer, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization_config": {}}, "say load_in_4bit=True or load_in_8bit=True"),
        ({"unsloth_tiled_mlp": True}, "use_gradient_checkpointing='unsloth' is what saves memory"),
        ({"return_logits": True}, "returns logits as in transformers"),
        ({"text_only": True}, "FastLanguageModel gives its tokenizer alone"),
        ({"disable_log_stats": False}, "vLLM's statistics are not shown"),
        ({"device_map": "unsloth"}, "leave it out for one device, or give 'auto' for several"),
        ({"device_map_planner_kwargs": {"retained_rows": 8}}, "weights go where device_map says"),
    ],
)
def test_arguments_of_loading_that_nothing_follows(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FastLanguageModel.from_pretrained("nowhere", **arguments)


@pytest.mark.parametrize("template", [None, 3, Path("nowhere.jinja")])
def test_a_template_of_another_type_is_refused(template: Any) -> None:
    with pytest.raises(SettingsError, match=f"chat_template='{template}' is neither a built-in template nor a file"):
        get_chat_template(copy.deepcopy(tiny.tiny_tokenizer()), chat_template=template)


def test_the_best_step_can_be_asked_for(tmp_path: Path) -> None:
    rows = tiny.chat_rows(40)
    made = support.trainer(tmp_path, rows=rows, eval_split=0.5, load_best_model_at_end=True, max_steps=1)
    assert made.args.load_best_model_at_end and made.args.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packing": "perhaps"}, "SFTTrainer: packing = 'perhaps'"),
        ({"max_seq_length": 0}, "SFTTrainer: max_length = 0"),
    ],
)
def test_values_of_the_older_style_are_checked(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path))
    with pytest.raises(SettingsError, match=message):
        SFTTrainer(tiny.tiny_model("llama"), args, [{"text": "a"}], tokenizer=tiny.tiny_tokenizer(), **arguments)


def test_a_trainer_of_another_library_is_not_masked() -> None:
    with pytest.raises(SettingsError, match="this masks rows of tunesmith's own"):
        train_on_responses_only(object())  # type: ignore[arg-type]


def test_what_is_held_out_and_which_step_is_kept_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = [{"text": "zq xj kv " * 5}] * 4
    trainer = support.trainer(
        tmp_path, eval_dataset=other, eval_steps=2, save_steps=2, num_train_epochs=2, learning_rate=5e-2
    )
    assert "held out" not in caplog.text
    trainer.train()
    best, last = trainer.state.best_global_step, trainer.state.global_step
    assert best < last and f"the weights are those of step {best} of {last}" in caplog.text
    support.trainer(tmp_path / "split", rows=40, eval_split=0.1)
    assert "4 of 40 rows are held out to evaluate on; eval_split=0 trains on all" in caplog.text


def test_an_adapted_embedding_trains(tmp_path: Path) -> None:
    model = support.adapted(target_modules=["q_proj", "embed_tokens", "lm_head"])
    before = support.trainable(model)
    support.trainer(tmp_path, model=model, max_steps=2).train()
    after = support.trainable(model)
    assert all(not after[name].equal(value) for name, value in before.items() if "embed_tokens" in name)


def test_a_stream_is_read_as_far_as_the_run_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def endless() -> Any:
        while True:
            yield from tiny.chat_rows(8)

    rows = IterableDataset.from_generator(endless)
    trainer = support.trainer(tmp_path, rows=rows, max_steps=4, eval_split=0.2)
    assert trainer.ledger.rows_in == 20 and "the first 20 are read, as many as max_steps=4 uses" in caplog.text
    splits = IterableDatasetDict({"train": rows})
    assert support.trainer(tmp_path, rows=splits, max_steps=4).ledger.rows_in == 16
    support.trainer(tmp_path, rows=rows.take(4))
    assert "the streamed rows are read to their end before training begins" in caplog.text
    packed = support.trainer(tmp_path, rows=rows, max_steps=4, packing=True, max_length=128)
    assert len(packed.train_dataset) >= 4 * 4, "no bin is trained on twice"
    assert "streamed rows of 2,048 tokens are read, as many as max_steps=4 uses" in caplog.text


def test_checkpointing_by_the_name_of_transformers(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    model = FastLanguageModel.from_pretrained(str(tmp_path / "model"), dtype="float32")[0]
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    support.trainer(tmp_path, model=model, gradient_checkpointing=True, max_steps=1).train()
    assert facts_of(model).checkpointing is True
    assert set(engine_of(model).policies) == {Policy.FULL}


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, LlamaForSequenceClassification])
def test_the_task_follows_from_the_class(kind: Any, tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    asked: dict[str, Any] = {"auto_model": kind, "num_labels": 3, "dtype": "float32"}
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path), **asked)
    assert facts_of(model).task == "SEQ_CLS" and model.config.num_labels == 3
    with pytest.raises(ModelError, match=r"loaded for SEQ_CLS, .* Use TaskTrainer"):
        SFTTrainer(model=model, processing_class=tokenizer, train_dataset=tiny.chat_rows(4))


def test_a_model_of_audio_is_refused(tmp_path: Path) -> None:
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        NotSupportedYetError, match=r"is a model of audio \(whisper\), and rows here hold text and images"
    ):
        FastModel.from_pretrained(str(tmp_path), auto_model=WhisperForConditionalGeneration)


def test_a_vocabulary_grown_by_transformers_comes_back(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), dtype="float32")
    tokenizer.add_tokens([f"<new {number}>" for number in range(40)])
    model.resize_token_embeddings(len(tokenizer))
    model = FastLanguageModel.get_peft_model(model, r=2, modules_to_save=["embed_tokens", "lm_head"])
    ids = torch.tensor([[3, 4, len(tokenizer) - 1]])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, own = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    assert len(own) == len(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    (tmp_path / "adapter" / "base.json").unlink()
    with pytest.raises(AdapterError, match=r"size mismatch for .*embed_tokens"):
        FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")


# ---- generation between trainings ----


def test_batches_of_prompts_are_padded_on_the_left_for_generation(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert tokenizer.padding_side == "right"
    FastLanguageModel.for_inference(FastLanguageModel.for_inference(model))
    prompts = ["the cat", "the dog ran home and the cat sat on a mat"]

    def answers(given: list[str]) -> list[list[int]]:
        ids = tokenizer(given, padding=True, return_tensors="pt")
        return [row.tolist()[-6:] for row in model.generate(**ids, max_new_tokens=6, do_sample=False)]

    assert answers(prompts) == [answer for prompt in prompts for answer in answers([prompt])]
    FastLanguageModel.for_training(model)
    assert tokenizer.padding_side == "right" and model.training


def test_the_modes_are_methods_of_the_model_too(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32")
    for own in (model, FastLanguageModel.get_peft_model(model, r=2)):
        assert own.for_inference() is own and not own.training and tokenizer.padding_side == "left"
        assert own.for_training(use_gradient_checkpointing=True) is own and own.training
        assert tokenizer.padding_side == "right" and facts_of(own).checkpointing is True


# ---- templates and ShareGPT ----


def test_names_of_families_keep_an_own_template_of_that_family(caplog: pytest.LogCaptureFixture) -> None:
    own = copy.deepcopy(tiny.tiny_tokenizer())
    own.chat_template = "{# mine #}" + own.chat_template
    mine = own.chat_template
    usual = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
    assert get_chat_template(own, "qwen-2.5", mapping=usual, map_eos_token=True).chat_template == mine
    assert "the tokenizer's own template, which is of that family, is kept" in caplog.text
    own.chat_template = None
    assert "<|im_start|>" in get_chat_template(own, chat_template="qwen3").chat_template
    assert "no template of that family, the built-in chatml is used" in caplog.text
    with pytest.raises(ModelError, match=r"needs <\|start_header_id\|>"):
        get_chat_template(own, "llama-3.1")
    jinja = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert get_chat_template(own, (jinja, "<|im_end|>")).chat_template == jinja
    with pytest.raises(ModelError, match="has no token '<nothing>'"):
        get_chat_template(own, (jinja, "<nothing>"))
    with pytest.raises(SettingsError, match=r"use standardize_sharegpt\(dataset\) first"):
        get_chat_template(own, "chatml", mapping={"role": "from", "content": "value", "user": "human"})
    with pytest.raises(SettingsError, match="as a first message with the role system"):
        get_chat_template(own, "chatml", system_message="x")


@pytest.mark.parametrize(
    ("marker", "names"),
    [
        ("<|user|>", ["phi-3", "phi-3.5", "phi-35", "zephyr"]),
        ("<|im_sep|>", ["phi-4", "phi4"]),
        ("<|turn>", ["gemma-4", "gemma4", "gemma-4-thinking"]),
        ("<start_of_turn>", ["gemma-3n", "gemma3n"]),
        ("<|start|>", ["gpt-oss", "gpt_oss"]),
        ("<|im_start|>", ["lfm-2", "lfm-2.5", "yi-chat", "qwen-25", "gemma_chatml"]),
        ("[INST]", ["llama"]),
        ("### Instruction:", ["alpaca"]),
        ("USER:", ["vicuna"]),
        ("GPT4 Correct User", ["starling"]),
        (">>> User:", ["unsloth"]),
    ],
)
def test_every_family_that_unsloth_names(marker: str, names: list[str]) -> None:
    tokenizer = copy.deepcopy(tiny.tiny_tokenizer())
    for name in names:
        tokenizer.chat_template = mine = f"{marker}{{{{ messages[0]['content'] }}}}"
        assert get_chat_template(tokenizer, name).chat_template == mine
    tokenizer.chat_template = "{# of another #}"
    if marker in ("<|im_start|>", "<start_of_turn>"):
        return
    with pytest.raises(SettingsError, match="template of another family, and no built-in one") as refused:
        get_chat_template(tokenizer, names[0])
    assert "Load the instruct model's tokenizer" in str(refused.value) and "Did you mean" not in str(refused.value)


def test_sharegpt_becomes_roles_and_content() -> None:
    rows = [{"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}], "id": 7}]
    wanted = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    for found in (standardize_sharegpt(rows), standardize_sharegpt(Dataset.from_list(rows))):
        assert found[0] == {"conversations": wanted, "id": 7}
    both = standardize_data_formats(DatasetDict(train=Dataset.from_list(rows)))
    assert standardize_sharegpt(both)["train"][0]["conversations"] == wanted
    with pytest.raises(DataError, match="no column conversations or messages: there are text"):
        standardize_sharegpt(Dataset.from_list([{"text": "x"}]))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert next(iter(standardize_sharegpt(stream, num_proc=2)))["conversations"] == wanted
    for turns in (["a question", "an answer"], '[{"role": "user"}]'):
        with pytest.raises(DataError, match="row 1: conversations has a turn that is text, and no object with role"):
            standardize_sharegpt([{"conversations": turns}])
    with pytest.raises(DataError, match="a generator was given; a datasets object or a list of rows is needed"):
        standardize_sharegpt(row for row in rows)
    assert is_bf16_supported() == is_bfloat16_supported()


def test_tokens_outside_assistant_masks_are_not_trained(tmp_path: Path) -> None:
    own = tiny.tiny_tokenizer()("the cat sat on a mat")["input_ids"]
    mask = [0, 0, 0] + [1] * (len(own) - 3)
    (document,) = support.trainer(tmp_path, rows=[{"input_ids": own, "assistant_masks": mask}]).train_data.documents
    assert document.trained.tolist() == [bool(one) for one in mask]


def test_a_token_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold two tokens or more, none below 0"):
        support.trainer(tmp_path, rows=[{"input_ids": [3, -100, 4]}])


def test_a_collator_that_masks_words_is_refused(tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(tiny.tiny_tokenizer(), mlm=False)
    collator.mlm = True
    with pytest.raises(SettingsError):
        support.trainer(tmp_path, data_collator=collator)


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "input", "value": "the cat"}, {"from": "output", "value": "sat"}],
        [{"role": "Human", "content": "the cat"}, {"role": "Assistant", "content": "sat"}],
        [{"speaker": "user", "text": "the cat"}, {"speaker": "assistant", "text": "sat"}],
        [{"text": "the cat", "who": "me"}, {"text": "sat", "who": "you"}],
    ],
)
def test_other_roles_and_keys_of_turns(turns: list[dict[str, str]]) -> None:
    rows = [{"conversations": turns}]
    wanted = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    more = {"aliases_for_user": ["me"], "aliases_for_assistant": ["you"]}
    for given in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        assert next(iter(standardize_sharegpt(given, **more)))["conversations"] == wanted


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "bot", "value": "x"}, r"row 2: conversations has a turn with from='bot', .*aliases_for_assistant"),
        ({"from": "gpt"}, r"row 2: conversations has a turn of assistant without value; its keys are 'from'"),
        ({"value": "x"}, r"row 2: conversations has a turn without role; its keys are 'value'"),
    ],
)
def test_a_turn_that_cannot_be_standardized_is_named(turn: dict[str, str], message: str) -> None:
    good = {"conversations": [{"from": "human", "value": "x"}]}
    with pytest.raises(DataError, match=message):
        standardize_sharegpt([good, {"conversations": [turn]}])
    with pytest.raises(DataError, match=r"row 2: conversations has a turn"):
        standardize_sharegpt(Dataset.from_list([good, {"conversations": [turn]}]))


def test_a_processor_asks_for_contents_in_parts() -> None:
    class Processor:
        image_processor = object()

    rows = [{"conversations": [{"from": "human", "value": "the cat"}]}]
    found = standardize_data_formats(rows, Processor())[0]["conversations"]
    assert found == [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]

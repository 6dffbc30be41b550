"""Names that scripts for Unsloth import: the same thing under another name, or an error that says what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests import tiny
from tests.training import support

import tunesmith
from tunesmith import FastLanguageModel, add_new_tokens, chat_templates, to_sharegpt, trainer
from tunesmith.core.errors import AdapterError, DataError, NotSupportedYetError, SettingsError


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("FastLlamaModel", "FastLanguageModel"),
        ("FastQwen2Model", "FastLanguageModel"),
        ("FastTextModel", "FastModel"),
        ("UnslothTrainer", "SFTTrainer"),
        ("UnslothTrainingArguments", "SFTConfig"),
        ("UnslothVisionDataCollator", "VisionDataCollator"),
    ],
)
def test_the_same_object_has_both_names(theirs: str, ours: str) -> None:
    assert getattr(tunesmith, theirs) is getattr(tunesmith, ours)


def test_modules_that_scripts_import_from() -> None:
    assert chat_templates.train_on_responses_only is tunesmith.train_on_responses_only
    assert chat_templates.get_chat_template is tunesmith.get_chat_template
    assert trainer.UnslothTrainer is tunesmith.SFTTrainer


def test_what_patches_trl_does_nothing_and_unsloth_train_trains(tmp_path: Path) -> None:
    tunesmith.PatchDPOTrainer()
    tunesmith.PatchKTOTrainer()
    tunesmith.PatchFastRL("GRPO", FastLanguageModel)
    assert tunesmith.unsloth_train(support.trainer(tmp_path, max_steps=1)).global_step == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RawTextDataLoader", "RawTextDataLoader is not part of tunesmith. Give SFTTrainer rows with a column text"),
        ("check_python_modules", "in a process of its own, in a container"),
        ("create_locked_down_function", "in a process of its own"),
        ("execute_with_time_limit", "timeout=seconds"),
        ("launch_openenv", "Start the environment's server yourself"),
    ],
)
def test_a_name_without_counterpart_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(NotSupportedYetError, match=message):
        getattr(tunesmith, name)(2)


def test_so_do_the_methods_of_one() -> None:
    with pytest.raises(NotSupportedYetError, match="task_type='FEATURE_EXTRACTION'"):
        tunesmith.FastSentenceTransformer.from_pretrained("model")
    with pytest.raises(NotSupportedYetError, match="pip install synthetic-data-kit"):
        tunesmith.SyntheticDataKit.from_pretrained("model")
    with pytest.raises(NotSupportedYetError, match="Give SFTTrainer the conversations as they are"):
        chat_templates.apply_chat_template([], tokenizer=None, chat_template="{INPUT}")
    assert not hasattr(tunesmith.SyntheticDataKit, "__wrapped__")


def test_new_tokens_have_rows_that_are_the_mean_of_the_old(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_model(tmp_path)
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32")
    before = model.get_input_embeddings().weight.detach().clone()
    spare = len(before) - len(tokenizer)
    add_new_tokens(model, tokenizer, [f"<new {number}>" for number in range(spare + 2)])
    after = model.get_input_embeddings().weight
    assert len(after) == len(tokenizer) == len(before) + 2
    torch.testing.assert_close(after[-2:].detach(), before.mean(0).expand(2, -1))
    assert torch.equal(after[: len(before)], before)
    with caplog.at_level(logging.WARNING):
        add_new_tokens(model, tokenizer, ["<new 0>"])
    assert "new ones take spare rows as they are" in caplog.text
    with pytest.raises(SettingsError, match="method='interpolation'"):
        add_new_tokens(model, tokenizer, ["<a>"], method="interpolation")
    with pytest.raises(SettingsError, match="a list of texts is needed"):
        add_new_tokens(model, tokenizer, "<a>")
    with pytest.raises(AdapterError, match="call it before"):
        add_new_tokens(FastLanguageModel.get_peft_model(model, r=2), tokenizer, ["<a>"])


ROWS = [
    {"instruction": "the cat", "input": "on a mat", "output": "sat"},
    {"instruction": "the {dog}", "input": "", "output": "ran"},
]


def test_columns_become_conversations() -> None:
    asked: dict[str, Any] = {"merged_prompt": "{instruction}[[ with {input}]]?", "output_column_name": "output"}
    wanted = ["the cat with on a mat?", "the {dog}?"]
    for given in (ROWS, Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()):
        found = list(to_sharegpt(given, **asked))
        assert [row["conversations"][0] for row in found] == [{"from": "human", "value": text} for text in wanted]
        assert [set(row) for row in found] == [{"conversations"}] * 2
    longer = to_sharegpt(Dataset.from_list(ROWS), **asked, conversation_extension=3, remove_unused_columns=False)
    assert [len(row["conversations"]) for row in longer] == [6, 6] and longer[0]["output"] == "sat"
    assert [turn["value"] for turn in longer[0]["conversations"][:2]] == ["the cat with on a mat?", "sat"]
    assert to_sharegpt(ROWS)[0]["conversations"][0]["value"] == "the cat"


def test_columns_that_cannot_become_conversations() -> None:
    with pytest.raises(DataError, match="no column 'question': there are instruction, input, output"):
        to_sharegpt(ROWS, "{question}")
    with pytest.raises(DataError, match="row 2: column 'input' is null"):
        to_sharegpt([ROWS[0], {**ROWS[1], "input": None}], "{instruction} {input}")
    with pytest.raises(DataError, match="which a stream does not let"):
        to_sharegpt(Dataset.from_list(ROWS).to_iterable_dataset(), conversation_extension=2)

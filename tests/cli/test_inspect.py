import json
import shutil

import pytest
from tests.cli.conftest import write_rows

from tunesmith.cli.inspect import pieces
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.types import Conversation

ROWS = [
    {"messages": [{"role": "user", "content": "[red]the cat"}, {"role": "assistant", "content": "sat on\na mat"}]},
    {"messages": [{"role": "user", "content": "the dog"}]},
]


def test_inspect_shows_ledger_trained_tokens_and_agreement(run, tmp_path, model_folder):
    outcome = run("inspect", write_rows(tmp_path / "rows.jsonl", ROWS), "--model", model_folder)
    assert outcome.code == 0
    assert "2 in, 1 kept, 1 dropped" in outcome.out
    assert "no assistant turn" in outcome.out
    assert "[red]the cat<|im_end|>" in outcome.out
    assert "⟦sat on\na mat<|im_end|>⟧" in outcome.out
    assert "OK (first 1 conversations)" in outcome.out
    assert outcome.err == ""


def test_inspect_lines_fit_the_terminal(run, rows_file, model_folder):
    shown = run("inspect", rows_file, "--model", model_folder, "--rows", 0).out
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_counts_as_train_does(run, rows_file, model_folder, trained_run):
    report = json.loads(run("inspect", rows_file, "--model", model_folder, "--json").out)
    ledger = json.loads((trained_run / "ledger.json").read_text())["train"]
    for name in ("rows_in", "rows_kept", "tokens", "trained_tokens", "length_longest"):
        assert report["ledger"][name] == ledger[name]


def test_inspect_has_the_window_of_train(run, tmp_path, rows_file, model_folder):
    words = ("--model", model_folder, "--max-seq-length", 80)
    trained = run("train", "--data", rows_file, *words, "--output-dir", tmp_path / "run", "--max-steps", 1,
                  "--eval-split", 0)  # fmt: skip
    assert trained.code == 0, trained.err
    report = json.loads(run("inspect", rows_file, *words, "--json").out)
    assert report["ledger"] == json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]
    assert report["ledger"]["rows_kept"] < 40
    assert run("inspect", rows_file, "--model", model_folder, "--max-seq-length", 2049).code == 2


def test_json_holds_the_text_of_every_token(run, rows_file, model_folder, tiny_tokenizer):
    report = json.loads(run("inspect", rows_file, "--model", model_folder, "--json", "--rows", 2).out)
    assert len(report["rows"]) == 2
    assert report["inference_agreement"] == {"conversations": 40, "differences": []}
    row = json.loads(rows_file.read_text().splitlines()[0])
    whole = tiny_tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert "".join(piece["text"] for piece in report["rows"][0]["pieces"]) == whole


def test_a_run_and_an_adapter_are_inspected_with_their_base(run, tmp_path, rows_file, trained_run):
    assert run("inspect", rows_file, "--model", trained_run, "--rows", 0).code == 0
    # Its tokenizer is the one that it was trained with.
    own = shutil.copytree(trained_run / "adapter", tmp_path / "adapter")
    template = own / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>' + ", "<|im_start|>own ' + "))
    assert "own user" in run("inspect", rows_file, "--model", own).out


def test_too_long_rows_leave_an_error_behind_the_ledger(run, rows_file, model_folder):
    outcome = run("inspect", rows_file, "--model", model_folder, "--max-length", 5)
    assert outcome.code == 2
    assert "40 in, 0 kept, 40 dropped" in outcome.out
    assert outcome.err.startswith("error: nothing to train on")


def test_a_template_that_prompts_otherwise_than_it_trains_is_named(run, tmp_path, model_folder):
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\nSure: {% endif %}"
    )
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    outcome = run("inspect", rows, "--model", model_folder, "--chat-template", template)
    assert "NO, 1 differences in the first 1 conversations" in outcome.out
    assert "rows.jsonl:1: message 1" in outcome.out


def test_columns_are_mapped(run, tmp_path, model_folder):
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nthe cat,sat\n")
    columns = ("--map", "question=user", "--map", "answer=assistant")
    assert "⟦sat<|im_end|>⟧" in run("inspect", file, "--model", model_folder, *columns).out


@pytest.mark.parametrize("train_on", ["assistant", "all", "last"])
def test_pieces_are_the_document(tiny_tokenizer, train_on):
    messages = [
        {"role": "user", "content": " the  cat é漢🙂"},
        {"role": "assistant", "content": "🙂 sat , on"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "mat"},
    ]
    encoder = ExampleEncoder(tiny_tokenizer, train_on=train_on)
    document = encoder.encode(Conversation(messages, (None,) * 4, "here", "messages"))[0]
    found = pieces(document, tiny_tokenizer)
    assert "".join(piece.text for piece in found) == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    trained = "".join(piece.text for piece in found if piece.trained)
    expected = {"assistant": "🙂 sat , on<|im_end|>mat<|im_end|>", "last": "mat<|im_end|>"}
    if train_on != "all":
        assert trained == expected[train_on]
        assert {piece.text for piece in found if piece.is_end} == {"<|im_end|>"}


def test_negative_rows_are_refused(run, rows_file, model_folder):
    assert run("inspect", rows_file, "--model", model_folder, "--rows", -1).code == 2


def test_the_first_token_of_ids_without_a_mask_is_not_trained(run, tmp_path, model_folder):
    rows = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [7, 8, 9]}])
    report = json.loads(run("inspect", rows, "--model", model_folder, "--json").out)
    assert [piece["trained"] for piece in report["rows"][0]["pieces"]] == [False, True]
    assert report["ledger"]["trained_tokens"] == 2

"""Rows become prompts and references, the base stands beside the tuned model, and the report can be written down."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tunesmith.core.errors import EvaluationError, ModelError, OutputError
from tunesmith.data.types import Completion, Conversation, SourceRow, Text
from tunesmith.evaluation import evaluate, generate_answers, read_evaluation_rows


def conversation(*turns: str, where: str = "rows:1") -> Conversation:
    """Return a conversation of user and assistant in turn."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    return Conversation(messages=messages, train=(None,) * len(turns), where=where, schema="messages")


def write_lines(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages_row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_the_prompt_is_all_before_the_last_answer_and_what_follows_it_is_dropped():
    row = read_evaluation_rows([conversation("q1", "a1", "q2", "a2", "q3")])[0][0]
    assert [message["content"] for message in row.prompt] == ["q1", "a1", "q2"]
    assert row.references == ("a2",)


def test_any_ideal_of_an_evals_row_is_a_reference():
    asked = [{"role": "user", "content": "Capital?"}]
    rows = [
        SourceRow({"input": asked, "ideal": ["Paris", "paris"]}, "e:1"),
        SourceRow({"input": asked, "ideal": "P"}, "e:2"),
    ]
    first, second = read_evaluation_rows(rows)[0]
    assert (first.references, second.references) == (("Paris", "paris"), ("P",))
    assert [message["content"] for message in first.prompt] == ["Capital?"]


def test_completions_are_plain_text():
    row = read_evaluation_rows([Completion(prompt="2+2=", completion="4", where="c:1")])[0][0]
    assert (row.prompt, row.references) == ("2+2=", ("4",))


def test_unusable_rows_are_counted_and_a_source_without_others_is_refused():
    text = Text(text="abc", where="t:1")
    rows, refused = read_evaluation_rows([text, conversation("q", "a"), text])
    assert len(rows) == 1
    assert refused == {"no answer to compare with": 2}
    assert len(read_evaluation_rows([text], with_reference=False)[0]) == 1
    with pytest.raises(EvaluationError, match=r"no row can be scored: 1 x no answer to compare with"):
        read_evaluation_rows([text])
    with pytest.raises(EvaluationError, match="there is none"):
        read_evaluation_rows([])


def test_a_limit_counts_usable_rows_and_must_be_positive():
    rows = [Text(text="abc", where="t:1"), *(conversation("q", str(i)) for i in range(5))]
    assert [row.references for row in read_evaluation_rows(rows, limit=2)[0]] == [("0",), ("1",)]
    with pytest.raises(EvaluationError, match="limit is 0"):
        read_evaluation_rows(rows, limit=0)


def test_a_folder_is_scored_on_its_test_rows_and_a_file_on_its_own(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    train = write_lines(folder / "train.jsonl", [messages_row("q", "train")])
    write_lines(folder / "valid.jsonl", [messages_row("q", "valid")])
    assert read_evaluation_rows(folder)[0][0].references == ("valid",)
    write_lines(folder / "test.jsonl", [messages_row("q", "test")])
    assert read_evaluation_rows(folder)[0][0].references == ("test",)
    assert read_evaluation_rows(folder, split="train")[0][0].references == ("train",)
    assert read_evaluation_rows(train)[0][0].references == ("train",)
    assert read_evaluation_rows([messages_row("q", "listed")])[0][0].references == ("listed",)


def test_columns_are_mapped(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"question": "q", "reply": "r"}])
    row = read_evaluation_rows(file, mapping={"question": "user", "reply": "assistant"})[0][0]
    assert row.references == ("r",)


def test_a_plain_model_has_no_base_beside_it(model, tokenizer):
    questions = ["one", "two", "three"]
    answers = generate_answers(
        model, tokenizer, [[{"role": "user", "content": q}] for q in questions], max_new_tokens=5
    )
    rows = [conversation(q, a) for q, a in zip(questions, [*answers[:2], "wrong"], strict=True)]
    report = evaluate(model, tokenizer, rows, "exact_match", max_new_tokens=5)
    assert report.base is None and report.difference is None
    assert report.tuned.score.per_row == (1.0, 1.0, 0.0)
    assert report.tuned.answers == tuple(answers)
    figures = json.loads(json.dumps(report.as_dict()))
    assert figures["metric"] == "exact_match"
    assert figures["model"]["value"] == pytest.approx(2 / 3)
    assert figures["model"]["count"] == 3
    assert figures["model"]["tokens_per_second"] > 0
    assert "base" not in figures


def test_the_base_is_scored_beside_the_tuned_model(adapted, tokenizer):
    prompts = [[{"role": "user", "content": q}] for q in ("one", "two", "three")]
    with adapted.disable_adapter():
        before = generate_answers(adapted, tokenizer, prompts, max_new_tokens=5)
    after = generate_answers(adapted, tokenizer, prompts, max_new_tokens=5)
    assert all(one != other for one, other in zip(before, after, strict=True))
    rows = [conversation("one", after[0]), conversation("two", after[1]), conversation("three", before[2])]
    seen: list[tuple[str, int, int]] = []
    report = evaluate(
        adapted, tokenizer, rows, "exact_match", max_new_tokens=5, progress=lambda *done: seen.append(done)
    )
    assert report.base is not None and report.difference is not None
    assert report.base.answers == tuple(before)
    assert report.tuned.answers == tuple(after)
    assert (report.base.score.value, report.tuned.score.value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (report.difference.wins, report.difference.losses) == (2, 1)
    assert seen == [("base", 3, 3), ("model", 3, 3)]
    assert set(report.as_dict()) == {"metric", "model", "base", "difference", "refused"}
    assert evaluate(adapted, tokenizer, rows, "exact_match", max_new_tokens=2, with_base=False).base is None


def test_a_stop_string_ends_the_answers_of_plain_prompts(model, tokenizer):
    free = generate_answers(model, tokenizer, ["2+2="], max_new_tokens=8)[0]
    rows = [Completion(prompt="2+2=", completion=free[:3], where="c:1")]
    report = evaluate(model, tokenizer, rows, "exact_match", max_new_tokens=8, stop=free[3:5])
    assert report.tuned.answers == (free[:3],)
    assert report.tuned.score.value == 1.0


def test_what_was_frozen_stays_frozen_and_the_adapter_is_on_again(adapted, tokenizer):
    frozen = [parameter for name, parameter in adapted.named_parameters() if "layers.0" in name and "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in adapted.parameters()]
    assert len(frozen) > 0 and any(before)
    ids = torch.tensor([[5, 6, 7]])
    adapted.eval()
    logits = adapted(ids).logits
    adapted.train()
    evaluate(adapted, tokenizer, [conversation("one", "two")], "contains", max_new_tokens=2)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == before
    assert adapted.training
    adapted.eval()
    assert torch.equal(adapted(ids).logits, logits)


def test_perplexity_is_the_loss_of_the_trained_tokens_alone(model, tokenizer):
    rows = [conversation("one", "abc"), conversation("two", "a longer answer", "three", "x")]
    report = evaluate(model, tokenizer, rows, "perplexity")
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        text = tokenizer.apply_chat_template(row.messages, tokenize=False)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        position = 0
        for message in row.messages:
            position += len(f"<|im_start|>{message['role']}\n") - len("<|im_start|>") + 1
            end = position + len(message["content"]) + 1  # a byte a token, and <|im_end|>
            if message["role"] == "assistant":
                total, count = total + losses[position - 1 : end - 1].double().sum().item(), count + end - position
            position = end + 1  # the line break
    score = report.tuned.score
    assert score.details["tokens"] == count == report.tuned.tokens
    assert score.value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert report.tuned.answers == ()


def test_perplexity_reads_plain_text_and_compares_the_base(adapted, tokenizer):
    rows = [Text(text="some plain text", where="t:1"), Completion(prompt="a", completion="b", where="c:1")]
    adapted.train()
    report = evaluate(adapted, tokenizer, rows, "perplexity")
    assert adapted.training
    assert report.base is not None and report.difference is not None
    adapted.eval()  # dropout was off the first time too
    assert evaluate(adapted, tokenizer, rows, "perplexity").tuned.score.value == report.tuned.score.value
    assert report.difference.value == pytest.approx(report.tuned.score.value - report.base.score.value)
    assert report.difference.value != 0
    assert all("answer" not in row for row in report.row_dicts())


def test_rows_are_written_as_json_lines_and_nothing_is_overwritten(model, tokenizer, tmp_path):
    report = evaluate(model, tokenizer, [conversation("é", "b", where="rows:7")], "contains", max_new_tokens=3)
    path = tmp_path / "rows.jsonl"
    report.write_rows(path)
    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert row["where"] == "rows:7"
    assert row["prompt"] == [{"role": "user", "content": "é"}]
    assert row["references"] == ["b"]
    assert row["answer"] == report.tuned.answers[0]
    assert row["score"] in (0.0, 1.0)
    with pytest.raises(OutputError, match="exists already"):
        report.write_rows(path)
    with pytest.raises(OutputError, match="cannot be written"):
        report.write_rows(tmp_path / "missing" / "rows.jsonl")


def test_rows_that_the_template_refuses_are_counted(model, tokenizer, monkeypatch):
    picky = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    rows = [conversation("bad", "a"), conversation("good", "a")]
    report = evaluate(model, tokenizer, rows, "exact_match", max_new_tokens=2)
    assert report.tuned.score.count == len(report.rows) == 1
    assert report.refused == {"chat template refuses the row": 1}


def test_rows_that_do_not_fit_the_window_are_counted(model, tokenizer):
    rows = [conversation("the cat " * 300, "a"), conversation("good", "a")]
    report = evaluate(model, tokenizer, rows, "exact_match", max_new_tokens=2)
    assert report.tuned.score.count == 1
    assert report.refused == {"too long for the model's window with 2 tokens of answer": 1}
    report = evaluate(model, tokenizer, rows, "perplexity")
    assert report.refused == {"too long for the model's window": 1}


def test_a_reference_that_the_metric_cannot_use_is_found_before_any_answer_is_generated(model, tokenizer):
    calls: list[object] = []
    with pytest.raises(EvaluationError, match=r"row 2 is no valid pattern"):
        evaluate(
            model,
            tokenizer,
            [conversation("q", "a"), conversation("q", "(")],
            "regex",
            progress=lambda *done: calls.append(done),
        )
    assert calls == []


def test_an_unknown_metric_and_a_missing_template_are_refused_before_any_work(model, tokenizer, monkeypatch):
    with pytest.raises(EvaluationError, match="Did you mean 'json_match'"):
        evaluate(model, tokenizer, [conversation("q", "a")], "jsn_match")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="chat_template="):
        evaluate(model, tokenizer, [conversation("q", "a")], "exact_match")


def test_rows_with_images_are_counted_and_not_scored():
    shown = Conversation(conversation("q", "a").messages, (None, None), "rows:1", "messages", images=("cat.png",))
    rows, refused = read_evaluation_rows([shown, conversation("q", "a")])
    assert len(rows) == 1 and refused == {"images": 1}


def test_losses_of_a_model_in_16_bits_are_summed_in_float32(model):
    import copy

    import numpy as np

    from tunesmith.data.types import Document
    from tunesmith.evaluation.likelihood import row_losses

    half, ids = copy.deepcopy(model).bfloat16().eval(), torch.arange(40) % 17 + 5
    (loss,), _ = row_losses(half, [[Document(ids.numpy().astype(np.int32), np.ones(40, dtype=bool), "x")]])
    with torch.no_grad():
        logits = half(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item(), rel=1e-4)

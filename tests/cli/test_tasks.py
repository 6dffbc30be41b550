"""``tunesmith train`` and ``evaluate`` for tasks other than language modelling."""

import json
from pathlib import Path

import pytest
import yaml
from tests import tiny_tasks
from tests.cli.conftest import write_rows

from tunesmith import FastLanguageModel
from tunesmith.core.tasks import TASKS

OTHERS = [name for name in TASKS if name != "CAUSAL_LM"]
SHORT = ("--max-steps", 3, "--r", 2, "--dtype", "float32", "--use-gradient-checkpointing", "false")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_tasks.save_base(folder / family, family) for family in ("bert", "t5")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {task: write_rows(folder / f"{task}.jsonl", tiny_tasks.ROWS[task](40)) for task in OTHERS}


@pytest.mark.parametrize("task", OTHERS)
def test_a_run_of_each_task_and_its_evaluation(run, tmp_path, bases, files, task):
    folder, base = tmp_path / "run", bases[tiny_tasks.FAMILY_OF.get(task, "bert")]
    words = ("--model", base, "--data", files[task], "--output-dir", folder, *SHORT)
    outcome = run("train", "--task", TASKS[task].words, *words)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert f"task {task}" in shown
    assert "batches are padded and layers are transformers' own" in shown
    assert "40 in, 40 kept, 0 dropped" in shown
    assert f"tunesmith evaluate --model {folder} --data ROWS" in outcome.out
    assert [line for line in outcome.out.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["task"] == task
    assert not (folder / "plan.json").exists()
    numbers = json.loads((folder / "result.json").read_text())
    assert numbers["steps"] == 3 and any(name.startswith("eval_") for name in numbers)
    assert "AutoPeftModelFor" in (folder / "adapter" / "README.md").read_text()
    report = tmp_path / "report.json"
    scored = run("evaluate", "--model", folder, "--data", files[task], "--limit", 10, "--output", report)
    assert scored.code == 0, scored.err
    assert f"{task} on 10 rows" in scored.out
    written = json.loads(report.read_text())
    assert len(written["rows"]) == 10 and written["task"] == task
    assert ("base" in written) == (not TASKS[task].heads)
    resumed = run("train", folder / "settings.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert "Resuming from" in resumed.err
    again = run("train", folder / "settings.yaml")
    assert again.code == 2 and "already holds a run" in again.err


def test_a_settings_file_with_a_mapping_and_rows_for_evaluation(run, tmp_path, bases):
    rows = [{"headline": row["text"], "kind": row["label"]} for row in tiny_tasks.colour_rows(60)]
    train, held_out = write_rows(tmp_path / "a.jsonl", rows[:40]), write_rows(tmp_path / "b.jsonl", rows[40:])
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "task_type": "SEQ_CLS", "model": str(bases["bert"]), "data": str(train), "eval_data": str(held_out),
        "map": {"headline": "text", "kind": "label"}, "max_steps": 2, "output_dir": str(tmp_path / "run"),
        "full_finetuning": True, "dtype": "float32", "use_gradient_checkpointing": False,
    }))  # fmt: skip
    outcome = run("train", config)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "task_type: SEQ_CLS is read as task: SEQ_CLS" in shown
    assert "task SEQ_CLS: cold, warm; new, from chance: classifier" in shown
    assert "40 to train on, 20 for evaluation" in shown
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "run"))
    assert model.config.id2label == {0: "cold", 1: "warm"}
    # Rows with the columns of the run need no --map, and those with the usual names none either.
    for file in (held_out, write_rows(tmp_path / "usual.jsonl", tiny_tasks.colour_rows(60)[40:])):
        scored = run("evaluate", "--model", tmp_path / "run", "--data", file)
        assert scored.code == 0, scored.err
        assert ("read as in the run: --map headline=text,kind=label" in scored.out) == (file == held_out)
    # A head that is there keeps its labels, whichever the rows have.
    more = write_rows(tmp_path / "c.jsonl", [{"text": "ann", "label": "cold"}, {"text": "bob", "label": "hot"}] * 20)
    words = ("--task", "seq_cls", "--model", tmp_path / "run", "--data", more, *SHORT, "--output-dir", tmp_path / "x")
    refused = run("train", *words)
    assert refused.code == 2 and "label 'hot' is none of the model's labels" in refused.err
    assert not (tmp_path / "x" / "settings.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--task", "tagging"), "task 'tagging' is not known"),
        (("train", "--task", "SEQ_CLS", "--packing"), "packing: for CAUSAL_LM only"),
        (("train", "--task", "SEQ_CLS", "--load-in-4bit"), "load_in_4bit: for CAUSAL_LM only"),
        (("train", "--task", "TOKEN_CLS"), "for example --map text=tokens (in Python mapping={'text': 'tokens'})"),
        (("plan", "--task", "SEQ_CLS"), "a plan for SEQ_CLS is not supported yet"),
    ],
)
def test_mistakes_are_said_in_one_sentence(run, tmp_path, bases, files, words, said):
    outcome = run(*words, "--model", bases["bert"], "--data", files["SEQ_CLS"])
    assert outcome.code == 2
    assert said in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err


def test_every_evaluation_row_that_is_also_trained_on(run, tmp_path, bases, files):
    words = ("--model", bases["bert"], "--data", files["SEQ_CLS"], "--output-dir", tmp_path / "run", *SHORT)
    outcome = run("train", "--task", "SEQ_CLS", *words, "--eval-data", files["SEQ_CLS"])
    assert outcome.code == 2 and "every evaluation row is also a training row" in " ".join(outcome.err.split())


def test_commands_that_write_text_refuse_other_models(run, tmp_path, bases, files):
    folder = bases["bert"]
    outcome = run("generate", "ann", "--model", folder)
    assert outcome.code == 2 and "was trained for FEATURE_EXTRACTION and is no language model" in outcome.err
    data = ("--data", files["FEATURE_EXTRACTION"])
    outcome = run("evaluate", "--model", folder, *data, "--metric", "exact_match")
    assert outcome.code == 2 and "--metric: without effect on FEATURE_EXTRACTION" in outcome.err
    outcome = run("evaluate", "--model", folder, *data, "--limit", 0)
    assert outcome.code == 2 and "limit is 0. Use 1 or more" in outcome.err


def test_what_is_shown_of_rows_and_memory_is_of_models_that_write(run, tmp_path, bases, files):
    rows = files["SEQ_CLS"]
    words = ("--model", bases["bert"], "--data", rows, "--output-dir", tmp_path / "run", *SHORT)
    assert run("train", "--task", "SEQ_CLS", *words).code == 0
    for command in (("inspect", rows), ("plan", "--data", rows)):
        outcome = run(*command, "--model", tmp_path / "run")
        assert outcome.code == 2 and "was trained for SEQ_CLS: rows and memory are shown" in outcome.err
        outcome = run(*command, "--model", bases["bert"])
        assert outcome.code == 2 and "is an encoder (bert) and writes no text" in outcome.err


def test_an_encoder_without_a_task_is_refused_with_those_it_takes(run, tmp_path, bases, rows_file):
    outcome = run("train", "--model", bases["bert"], "--data", rows_file, "--output-dir", tmp_path / "run")
    assert outcome.code == 2 and not (tmp_path / "run").exists()
    assert "is an encoder (bert) and writes no text" in outcome.err and "--task SEQ_CLS, TOKEN_CLS" in outcome.err


def test_a_language_model_needs_a_metric(run, model_folder, rows_file):
    outcome = run("evaluate", "--model", model_folder, "--data", rows_file)
    assert outcome.code == 2 and "--metric is missing. Metrics are: exact_match" in " ".join(outcome.err.split())

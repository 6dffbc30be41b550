"""Runs that go on: from their last step, from none, where nothing is, and while another process is there."""

import json
import shutil

import yaml

from tunesmith.core.files import lock, sha256

FAST = ("--r", 2, "--no-packing", "--dtype", "float32", "--lr", "1e-2")


def adapter(folder):
    return sha256(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_that_is_done_has_no_step_left(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *FAST)
    assert run("train", *words, "--max-steps", 6, "--eval-split", 0, "--save-steps", 3).code == 0  # 5 steps an epoch
    before = adapter(folder)
    shutil.rmtree(folder / "adapter")  # as where a process died after its last checkpoint
    (folder / "result.json").unlink()
    outcome = run("train", folder / "settings.yaml", "--resume")
    assert outcome.code == 0 and "7/6" not in outcome.out
    assert adapter(folder) == before and json.loads((folder / "result.json").read_text())["steps"] == 6
    assert not (folder / ".lock").exists()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run("train", folder / "settings.yaml", "--resume")
    assert "the run was finished: 6 of 6 steps; nothing was left to do" in again.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_a_run_that_was_stopped_early_stays_stopped(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *FAST[:-2])
    stops = ("--eval-steps", 1, "--save-steps", 1, "--early-stopping-patience", 1, "--max-steps", 60)
    assert run("train", *words, *stops, "--set", "learning_rate=0.3").code == 0
    steps, before = json.loads((folder / "result.json").read_text())["steps"], adapter(folder)
    assert steps < 60
    for _ in range(2):
        assert run("train", folder / "settings.yaml", "--resume").code == 0
        assert json.loads((folder / "result.json").read_text())["steps"] == steps and adapter(folder) == before


def test_resume_without_a_folder_says_how_to_name_it(run, model_folder, rows_file):
    outcome = run("train", "--model", model_folder, "--data", rows_file, "--resume")
    assert (
        outcome.code == 2 and "give --output-dir runs/NAME, or tunesmith train runs/NAME/settings.yaml" in outcome.err
    )


def test_early_stopping_where_too_few_rows_are_set_apart(run, tmp_path, model_folder, rows_file):
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", tmp_path / "run", "--limit", 16)
    outcome = run("train", *words, "--early-stopping-patience", 2)
    assert outcome.code == 2 and "no row is set apart for one" in outcome.err and "of 20 rows or more" in outcome.err


def test_where_nothing_is_nothing_is_resumed(run, tmp_path, model_folder, rows_file):
    words = ("--model", model_folder, "--data", rows_file, *FAST, "--max-steps", 1, "--resume")
    outcome = run("train", *words, "--output-dir", tmp_path / "typo")
    assert outcome.code == 2 and "there is no run in" in outcome.err and not (tmp_path / "typo").exists()


def test_before_the_first_checkpoint_records_are_those_of_what_is_trained(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *FAST)
    assert run("train", *words, "--max-steps", 2).code == 0
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert run("train", *words, "--max-steps", 1, "--limit", 20, "--resume").code == 0
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert (settings["max_steps"], settings["limit"]) == (1, 20)
    assert json.loads((folder / "ledger.json").read_text())["train"]["rows_in"] == 20


def test_one_process_writes_a_run(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *FAST, "--max-steps", 1)
    with lock(folder / ".lock", waits=False):
        outcome = run("train", *words)
        assert outcome.code == 2 and f"another process is writing to {folder}" in " ".join(outcome.err.split())
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert run("train", *words).code == 0


def test_settings_that_would_do_nothing(run, tmp_path, model_folder, rows_file):
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", tmp_path / "run", *FAST)
    outcome = run("train", *words, "--eval-data", rows_file, "--eval-split", 0.3)
    assert outcome.code == 2 and "Leave one out" in outcome.err
    outcome = run("train", *words, "--eval-split", 0, "--eval-steps", 3)
    assert outcome.code == 2 and "eval_steps needs an evaluation" in outcome.err
    outcome = run("train", *words, "--max-steps", 2, "--warmup-steps", 500)
    assert "the warmup of 500 steps is not shorter than the run of 2" in " ".join(outcome.err.split())

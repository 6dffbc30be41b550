"""Bad input of every kind through the command line: exit code 2, one message, no traceback, nothing written."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.cli.conftest import write_rows

GOOD = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}


def _write(name, content):
    def make(folder: Path) -> Path:
        file = folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return make


def _rows(*rows):
    return lambda folder: write_rows(folder / "rows.jsonl", list(rows))


def _said(*contents):
    turns = zip(("user", "assistant"), contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_DATA = {
    "missing": (lambda folder: folder / "rows.jsonl", "no data at"),
    "missing with a neighbour": (lambda folder: _rows(GOOD)(folder).with_name("row.jsonl"), "'rows.jsonl'"),
    "empty": (_write("rows.jsonl", ""), "is empty"),
    "not UTF-8": (_write("rows.jsonl", b'{"text": "caf\xe9"}\n'), "UTF-8"),
    "truncated JSON": (_write("rows.jsonl", json.dumps(GOOD) + '\n{"messages": [{"ro'), "rows.jsonl:2"),
    "wrong schema": (_rows({"color": "red"}), "color"),
    "no assistant turn": (_rows(_said("the cat")), "no assistant turn"),
    "null content": (_rows(_said("the cat", None)), "null"),
    "a million characters": (_rows(_said("the cat", "a" * 1_000_000)), "longer than 512 tokens"),
    "unknown suffix": (_write("rows.docx", "x"), ".docx"),
    "preference rows": (_rows({"prompt": "a", "chosen": "b", "rejected": "c"}), "rows.jsonl:1"),
}


def assert_refused(outcome, message, *, untouched=()):
    assert outcome.code == 2, outcome.out
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    for path in untouched:
        assert not path.exists()


@pytest.mark.parametrize("command", ["train", "inspect"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_trained_on(run, tmp_path, model_folder, command, case):
    make, message = BAD_DATA[case]
    data, output = make(tmp_path), tmp_path / "run"
    if command == "inspect":
        outcome = run("inspect", data, "--model", model_folder)
    else:
        outcome = run("train", "--data", data, "--model", model_folder, "--output-dir", output)
    assert_refused(outcome, message, untouched=[output])


def _train(run, model, rows, output, *words):
    return run("train", "--model", model, "--data", rows, "--output-dir", output, *words)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--set", "learning_rat=1"], ["unknown key 'learning_rat'", "'learning_rate'"]),
        (["--learning-rate", "fast"], ["learning_rate = 'fast'", "a number is needed"]),
        (["--r", "1.5"], ["r = '1.5'"]),
        (["--bias", "some"], ["bias = 'some'", "'none', 'lora_only' or 'all'"]),
        (["--warmup-ratio", "0.1", "--warmup-steps", "5"], ["warmup_ratio and warmup_steps"]),
        (["--max-length", "512", "--max-seq-length", "100"], ["max_length=512 is above max_seq_length=100"]),
        (["--max-seq-length", "5000"], ["5000", "512"]),
        (["--load-in-fp8", "true"], ["load_in_fp8='row' needs a GPU that computes in float8"]),
        (["--load-in-fp8", "block", "--full-finetuning"], ["load_in_fp8='block' stores a base that does not train"]),
        (["--load-in-4bit", "--load-in-8bit"], ["load_in_4bit=True and load_in_8bit=True: give one of them"]),
        (["--set", "load_in_16bit=true", "--dtype", "float32"], ["load_in_16bit=True and dtype=float32"]),
        (["--target-modules", "q_porj,v_proj"], ["'q_porj'", "'q_proj'"]),
        (["--optim", "adamw_fast"], ["adamw_fast"]),
        (["--target-modules", ".*q_proj", "--finetune-last-n-layers", "1"], ["the adapter does not fit"]),
        (["--layers-pattern", "layers"], ["the adapter does not fit"]),
        (["--rank-pattern", "q_porj=2"], ["rank_pattern 'q_porj' matched no layer", "'q_proj'"]),
        (
            ["--use-gradient-checkpointing", "always"],
            ["use_gradient_checkpointing = 'always'", "unsloth, auto, selective, offload"],
        ),
        (["--dtype", "bf61"], ["bf61", "bfloat16"]),
        (["--map", "question=usr"], ["usr", "user"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_settings_that_are_wrong(run, tmp_path, model_folder, rows_file, words, messages):
    outcome = _train(run, model_folder, rows_file, tmp_path / "run", *words)
    for message in messages:
        assert_refused(outcome, message, untouched=[tmp_path / "run"])


def test_all_problems_of_the_settings_are_listed_at_once(run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("modle: x\nlearning_rate: fast\nr: true\n")
    outcome = run("train", config)
    assert_refused(outcome, f"{config}: 5 problems")
    for words in (
        "unknown key 'modle'. Did you mean 'model'?",
        "learning_rate = 'fast'",
        "r = True",
        "data is missing",
    ):
        assert words in outcome.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a: [1", "not valid YAML"),
        ("- a", "a mapping of `key: value` lines is needed"),
        ("r: 1\nr: 2", "'r' is already set in line 1"),
        ("caf\xe9: 1", "not UTF-8"),
    ],
)
def test_a_settings_file_that_is_no_settings_file(run, tmp_path, text, message):
    config = tmp_path / "run.yaml"
    config.write_bytes(text.encode("latin-1"))
    assert_refused(run("train", config), message)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_is_no_settings_file_names_the_flag_that_was_meant(run, model_folder, rows_file, command):
    outcome = run(command, "--model", model_folder, "--data", rows_file, "--packing", "false")
    assert_refused(outcome, "false: switches take no value. Write --NAME or --no-NAME")
    assert_refused(run(command, rows_file, "--model", model_folder), f"Give it as --data {rows_file}")


def test_a_settings_file_that_is_not_there(run, tmp_path):
    assert_refused(run("train", tmp_path / "run.yaml"), "no such file")


def test_an_unknown_model_names_the_nearest(run, tmp_path, rows_file):
    assert_refused(_train(run, "smollm-135m", rows_file, tmp_path / "run"), "'smollm2-135m'")


def test_a_corrupt_safetensors_file(run, tmp_path, model_folder, rows_file):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(
        _train(run, broken, rows_file, tmp_path / "run"), "corrupt or cut short", untouched=[tmp_path / "run"]
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody may write to is needed: Linux /proc")
@pytest.mark.parametrize("folder", ["/proc/tunesmith/run", "/sys/tunesmith/run"])
def test_a_folder_that_nobody_may_write_to(run, model_folder, rows_file, folder):
    assert_refused(_train(run, model_folder, rows_file, folder), f"{folder}", untouched=[Path(folder)])


def test_a_read_only_folder(run, tmp_path, model_folder, rows_file):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere (root)")
    assert_refused(_train(run, model_folder, rows_file, locked / "run"), "no permission", untouched=[locked / "run"])


def test_a_file_in_the_way_of_the_output_folder(run, tmp_path, model_folder, rows_file):
    (tmp_path / "run").write_text("mine")
    assert_refused(_train(run, model_folder, rows_file, tmp_path / "run"), "is a file")
    assert_refused(_train(run, model_folder, rows_file, tmp_path / "run" / "inner"), "is a file")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_holds_something_else_stays_as_it_is(run, tmp_path, model_folder, rows_file):
    (tmp_path / "mine.txt").write_text("mine")
    assert_refused(_train(run, model_folder, rows_file, tmp_path), "holds other files (mine.txt)")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_the_folder_of_another_run_stays_as_it_is(run, trained_run, model_folder, rows_file):
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    assert_refused(_train(run, model_folder, rows_file, trained_run), "already holds a run")
    other = _train(run, model_folder, rows_file, trained_run, "--resume", "--r", 4)
    assert_refused(other, "belongs to another run")
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == []


def test_settings_that_an_adapter_cannot_change(run, tmp_path, trained_run, rows_file):
    words = ("--r", 64, "--lora-alpha", 2, "--target-modules", "q_proj", "--bias", "none", "--random-state", 1)
    outcome = _train(run, trained_run, rows_file, tmp_path / "run", *words)
    assert_refused(outcome, "keeps its own settings", untouched=[tmp_path / "run"])
    for words in ("r: 2 -> 64", "lora_alpha: 16.0 -> 2.0", "-> ['q_proj']"):
        assert words in outcome.err
    assert "bias" not in outcome.err


def test_resume_without_a_folder(run, model_folder, rows_file):
    assert_refused(run("train", "--model", model_folder, "--data", rows_file, "--resume"), "give --output-dir")


def test_a_disk_that_is_nearly_full_is_seen_before_anything_is_written(
    run, tmp_path, model_folder, rows_file, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    outcome = _train(run, model_folder, rows_file, tmp_path / "run")
    assert_refused(outcome, "MiB free", untouched=[tmp_path / "run"])


def test_a_disk_that_is_really_full(run, tmp_path, model_folder, rows_file):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        assert_refused(_train(run, model_folder, rows_file, disk / "run"), "MiB free", untouched=[disk / "run"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)

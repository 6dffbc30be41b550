import json
import os
import re
import select
import signal
import time

import pytest
import yaml
from tests import forking

from tunesmith.cli.main import main

SHORT = ("--max-steps", 4, "--r", 2, "--no-packing", "--dtype", "float32")


def test_a_run_from_flags_says_what_it_does_in_eighty_columns_and_leaves_a_folder(
    run, tmp_path, model_folder, rows_file
):
    folder = tmp_path / "run"
    flags = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *SHORT, "--lr", "1e-3")
    outcome = run("train", *flags, "--set", "weight_decay=0.1")
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    for words in (
        "lr: 1e-3 is read as learning_rate: 1e-3",
        "40 in, 40 kept, 0 dropped",
        "dtype float32 (asked for)",
        "adapter LoRA, r 2, alpha 16, on down_proj",
        "rows 38 to train on, 2 for evaluation",
        "trained on answers only: ",
        "batch 8 documents = 2 x 4 accumulation x 1 device",
        "steps 5 an epoch, 4 in all",
        "eval step 4 loss",
        f"tunesmith chat {folder}",
    ):
        assert words in shown, words
    assert [line.split()[0] for line in outcome.out.splitlines() if "tok/s" in line] == ["1/4", "2/4", "3/4", "4/4"]
    assert [" left  " in line for line in outcome.out.splitlines() if "tok/s" in line] == [True, True, True, False]
    assert "it/s" not in outcome.out + outcome.err  # no bar of transformers
    too_long = [line for line in outcome.out.splitlines() if len(line) > 80]
    assert [line for line in too_long if str(tmp_path) not in line] == []
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert (settings["learning_rate"], settings["weight_decay"], settings["r"]) == (1e-3, 0.1, 2)
    assert settings["output_dir"] == str(folder)
    assert json.loads((folder / "result.json").read_text())["steps"] == 4
    assert (folder / "training_loss.png").is_file()


@pytest.mark.parametrize(("flag", "said"), [("--load-in-4bit", "4 bits (NF4, double quantization)"),
                                            ("--load-in-8bit", "8 bits")])  # fmt: skip
def test_a_run_on_a_quantized_base(run, tmp_path, model_folder, rows_file, flag, said):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--output-dir", folder, *SHORT, "--lr", "1e-2", flag)
    planned = run("plan", *words[:4], *SHORT, flag)
    assert planned.code == 0, planned.err
    outcome = run("train", *words)
    assert outcome.code == 0, outcome.err
    assert f"the decoder's linear layers in {said}" in " ".join(outcome.out.split())
    assert "slower" not in outcome.err
    numbers = json.loads((folder / "result.json").read_text())
    assert numbers["last_loss"] < numbers["first_loss"]
    answered = run("evaluate", "--model", folder, "--data", rows_file, "--metric", "perplexity", "--limit", 4, flag)
    assert answered.code == 0, answered.err
    answered = run("generate", "the cat", "--model", folder, "--max-new-tokens", 2)
    assert answered.code == 0 and "the base is loaded in" in answered.err
    whole = run("generate", "the cat", "--model", folder, "--max-new-tokens", 2, "--load-in-16bit")
    assert whole.code == 0 and "the base is loaded in" not in whole.err


def test_a_run_of_all_weights_leaves_a_model(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ("--model", model_folder, "--data", rows_file, "--full-finetuning", "--dtype", "float32")
    assert run("plan", *words).code == 0
    outcome = run("train", *words, "--output-dir", folder, "--max-steps", 3, "--lr", "1e-2", "--no-packing")
    assert outcome.code == 0, outcome.err
    assert "(100.00 %)" in outcome.out and "adapter" not in outcome.out
    assert (folder / "model" / "config.json").is_file() and not (folder / "adapter").exists()
    resumed = run("train", folder / "settings.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    answered = run("evaluate", "--model", folder, "--data", rows_file, "--metric", "perplexity", "--limit", 4)
    assert answered.code == 0, answered.err
    refused = run("train", *words, "--r", 4)
    assert refused.code == 2 and "leave out r" in refused.err


def test_a_file_with_flags_on_top(run, tmp_path, model_folder, rows_file):
    config = tmp_path / "run.yaml"
    written = {"model": str(model_folder), "data": str(rows_file), "lora_r": 4, "max_steps": 9, "warmup_ratio": 0.1}
    config.write_text(yaml.safe_dump({**written, "output_dir": str(tmp_path / "run")}))
    outcome = run("train", config, "--max-steps", 1, "--warmup-steps", 0, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert "lora_r: 4 is read as r: 4" in outcome.out
    settings = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert (settings["r"], settings["max_steps"], settings["warmup_ratio"]) == (4, 1, None)


def test_an_adapter_is_trained_on_as_it_is_and_the_record_says_so(run, tmp_path, trained_run, rows_file):
    folder = tmp_path / "run"
    flags = ("--model", trained_run, "--data", rows_file, "--output-dir", folder, "--max-steps", 2)
    same = ("--r", 2, "--target-modules", "all-linear", "--no-use-dora", "--use-gradient-checkpointing", "false")
    outcome = run("train", *flags, *same)
    assert outcome.code == 0, outcome.err
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert (settings["r"], settings["lora_alpha"], len(settings["target_modules"])) == (2, 16, 7)
    assert "\nr: 2\n" in (folder / "adapter" / "README.md").read_text()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert run("train", folder / "settings.yaml", "--resume").code == 0


def test_packing_says_bins(run, tmp_path, model_folder, rows_file):
    flags = ("--model", model_folder, "--data", rows_file, "--output-dir", tmp_path / "run", "--packing")
    shown = run("train", *flags, "--max-steps", 1, "--dtype", "float32").out
    assert "8 bins = 2 x 4" in shown
    filled = next(line for line in shown.splitlines() if line.startswith("packing"))
    assert 0 < float(filled.split(",")[-1].split("%")[0]) <= 100


def test_a_long_run_in_a_pipe_prints_about_fifty_lines(run, tmp_path, model_folder, rows_file):
    flags = ("--model", model_folder, "--data", rows_file, "--output-dir", tmp_path / "run", "--eval-split", 0)
    sizes = ("--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 1, "--save-steps", 200)
    outcome = run("train", *flags, *sizes, "--max-steps", 100, "--r", 2, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    steps = [line for line in outcome.out.splitlines() if "tok/s" in line]
    assert 40 <= len(steps) <= 52
    assert steps[-1].startswith("100/100")


def test_ctrl_c_saves_says_how_to_go_on_and_that_works(run, tmp_path, model_folder, rows_file):
    folder = tmp_path / "run"
    words = ["train", "--model", str(model_folder), "--data", str(rows_file), "--output-dir", str(folder)]
    words += ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "1", "--r", "2"]
    words += ["--max-steps", "40", "--dtype", "float32", "--eval-split", "0", "--save-steps", "1000"]
    files = tmp_path / "out", tmp_path / "err"
    process = forking.start(main, words, out=files[0], err=files[1])
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    out, err = (file.read_text() for file in files)
    assert process.exitcode == 130, err
    assert "Traceback" not in err
    step = int(out.split("stopped after step ")[1].split(",")[0])
    assert (folder / f"checkpoint-{step}").is_dir()
    command = out.strip().splitlines()[-1].split()
    assert command == ["tunesmith", "train", str(folder / "settings.yaml"), "--resume"]

    resumed = run(*command[1:])
    assert resumed.code == 0, resumed.err
    assert f"Resuming from {folder / f'checkpoint-{step}'}" in resumed.err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[:40] == list(range(1, 41))


def test_resume_goes_on_from_the_newest_checkpoint(run, trained_run):
    outcome = run("train", trained_run / "settings.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert "Resuming from" in outcome.err


def test_other_processes_of_a_run_are_silent(monkeypatch, capsys):
    from tunesmith.cli.console import console, print_lines

    monkeypatch.setenv("RANK", "1")
    console().print("text")
    print_lines(["text"])
    assert capsys.readouterr().out == ""


def test_progress_in_a_terminal_is_one_line_that_ends_with_the_run(model_folder, rows_file, tmp_path):
    """In a terminal of 80 columns every drawn line fits, and the live line is gone afterwards."""
    pytest.importorskip("pty")
    import fcntl
    import pty
    import struct
    import termios

    main_end, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = ["train", "--model", str(model_folder), "--data", str(rows_file), "--output-dir", str(tmp_path / "run")]
    words += ["--max-steps", "3", "--dtype", "float32"]
    process = forking.start(_in_terminal, words, out=os.ttyname(other_end))
    select.select([main_end], [], [], 60)  # now it has opened the other end too
    os.close(other_end)
    drawn = _read_all(main_end)
    process.join(60)
    assert process.exitcode == 0
    assert "3/3  loss" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is shown again
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn))
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []


def _in_terminal(words: list[str]) -> None:
    os.environ.pop("COLUMNS", None)
    os.environ["TERM"] = "xterm"
    main(words)


def _read_all(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()

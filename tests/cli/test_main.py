import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith.cli.main import COMMANDS, main


def fresh(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``tunesmith`` (or ``code``) in a new process that finds the same packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"}
    start = ["-c", code] if code is not None else ["-m", "tunesmith"]
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def test_help_is_there_within_half_a_second():
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ended = fresh("--help")
        seconds.append(time.perf_counter() - began)
    assert ended.returncode == 0
    assert all(name in ended.stdout for name in COMMANDS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["serve", "--help"], ["explain", "r"]], ids=" ".join
)
def test_nothing_heavy_is_imported_for_words_alone(words):
    code = (
        "import sys\nfrom tunesmith.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(' '.join({'torch', 'transformers', 'datasets', 'numpy', 'peft'} & set(sys.modules)))"
    )
    assert fresh(code=code).stderr == ""


def test_an_installed_command_runs_as_a_process(tmp_path: Path):
    ended = fresh("train", "--model", str(tmp_path / "nowhere"), "--data", str(tmp_path / "none.jsonl"))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: model ")
    assert "Traceback" not in ended.stderr


def test_paragraphs_of_help_are_filled(run):
    shown = run("train", "--help").out
    assert "checkpoints and the result." in " ".join(shown.split()) and "\n and the result." not in shown


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--temperature", -1, "--temperature -1.0 must be 0 (greedy) or more"),
        ("--top-p", 0, "--top-p 0.0 must be above 0"),
        ("--max-new-tokens", 0, "--max-new-tokens 0 must be 1 or more"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_a_model_is_loaded(run, command, flag, value, said):
    words = ("x",) if command == "chat" else ("hello", "--model", "x")
    outcome = run(command, *words, flag, value)
    assert outcome.code == 2 and said in outcome.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert f"Usage: tunesmith {name}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_stands_in_the_docs_as_a_section(name):
    page = Path(__file__).parents[2] / "docs" / "commands.md"
    assert f"\n## {name}\n" in page.read_text(encoding="utf-8")


def test_a_mistyped_command_names_the_nearest(run):
    outcome = run("trian")
    assert outcome.code == 2
    assert "train" in outcome.err


def test_an_unknown_flag_is_a_usage_error(run):
    outcome = run("train", "--learning-rat", "1e-3")
    assert outcome.code == 2
    assert "--learning-rat" in outcome.err


def test_version(run):
    from tunesmith import __version__

    assert run("--version").out == f"tunesmith {__version__}\n"


def test_ctrl_c_exits_with_130(run, monkeypatch):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.cli.explain.find_setting", interrupted)
    assert run("explain", "r").code == 130


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr("tunesmith.cli.explain.find_setting", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["explain", "r"])


def test_errors_show_text_as_it_is_and_unbroken(run):
    name = "[red]" + "x" * 100 + "\x1b[31m"
    outcome = run("explain", name)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "\x1b" not in outcome.err
    assert "[red]" + "x" * 100 in outcome.err


def test_only_the_first_process_prints_but_every_one_reports_its_error(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("explain", "r").out == ""
    assert run("explain", "no-such").err.startswith("error (process 1): there is no setting")

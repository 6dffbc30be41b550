from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.fake_hub import TOKEN, fake_hub

from tunesmith.training.run import run_training
from tunesmith.training.settings import RunSettings


@pytest.fixture(scope="module")
def run_folder(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    settings: dict[str, Any] = {"model": str(model_folder), "data": str(rows_file), "max_steps": 2, "r": 4,
                                "dtype": "float32", "learning_rate": 0.05, "eval_split": 0,
                                "output_dir": str(tmp_path_factory.mktemp("runs") / "run")}  # fmt: skip
    return run_training(RunSettings(**settings)).folder


@pytest.mark.usefixtures("exports_load_in_a_fork")
def test_the_command_says_how_near_the_export_is(run_folder: Path, tmp_path: Path, run: Any) -> None:
    outcome = run("export", run_folder, "--output", tmp_path / "out", "--method", "merged_32bit", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "loaded by transformers in another process" in shown and "(4 training rows)" in shown
    assert "KL divergence" in shown and "MiB of float32" in shown
    assert max(len(line) for line in outcome.out.splitlines() if str(tmp_path) not in line) <= 80
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert report["comparisons"]["base"]["kl"] <= 1e-6
    assert "3 of 3 greedy texts are equal" in shown and "tokenizer and chat template: equal" in shown
    assert "for scale: the untuned base is" in shown


@pytest.mark.usefixtures("exports_load_here")
def test_adapters_are_added_by_their_shares(run_folder: Path, model_folder: Path, tmp_path: Path, run: Any) -> None:
    from safetensors.torch import load_file

    flags = ("--method", "merged_32bit", "--dtype", "float32", "--max-shard-size", "1GB")
    for name, mix in {"half": [f"{run_folder}:0.5"], "twice": [f"{run_folder}:0.75", f"{run_folder}/adapter:-0.25"],
                      "whole": [run_folder]}.items():  # fmt: skip
        words = [word for adapter in mix for word in ("--adapter", adapter)]
        outcome = run("export", model_folder, *words, "--output", tmp_path / name, *flags)
        assert outcome.code == 0, outcome.err
    places = (tmp_path / "half", tmp_path / "twice", tmp_path / "whole", model_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    half, twice, whole, base = (load_file(place / "model.safetensors")[name] for place in places)
    torch.testing.assert_close(half, twice)
    torch.testing.assert_close(half - base, (whole - base) / 2, rtol=1e-3, atol=1e-6)
    assert not torch.equal(half, base)


def test_adapters_that_cannot_be_added_are_refused(
    run_folder: Path, model_folder: Path, tmp_path: Path, run: Any
) -> None:
    other = shutil.copytree(run_folder / "adapter", tmp_path / "other")
    (other / "base.json").write_text(json.dumps({"width": "4bit"}), encoding="utf-8")
    for second, message in (
        (model_folder, "is no adapter folder: it holds no adapter_config.json"),
        (other, "was trained on its base in another form (bits, window, vocabulary) than"),
    ):
        words = ("--adapter", run_folder, "--adapter", second, "--output", tmp_path / "new")
        outcome = run("export", model_folder, *words)
        assert outcome.code == 2 and message in " ".join(outcome.err.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("exports_load_here")
def test_an_export_is_uploaded_and_kept_nowhere(run_folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with fake_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        outcome = run("export", run_folder, "--push-to", "ada/cats", "--private", "--method", "lora")
        assert outcome.code == 0, outcome.err
        assert f"uploaded: {hub.address}/ada/cats" in outcome.out
        assert hub.made["ada/cats"]["visibility"] == "private"
        card = hub.files["ada/cats"]["README.md"].decode()
        assert "## Training" in card and "| steps | 2 |" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "new", "--method", "merged_16bits"), "Did you mean 'merged_16bit'"),
        (("--output", "new", "--method", "q8_0,q4_k_n"), "--method q4_k_n: only methods of GGUF can be several"),
        (("--output", "new", "--method", "q8_0,lora"), "only methods of GGUF can be several"),
        (("--output", "new", "--method", "iq1_s"), "needs an importance matrix"),
        (("--output", "new", "--method", "lora", "--imatrix", "a"), "--imatrix has no meaning for --method lora"),
        (("--output", "src"), "src is there already. Choose another folder"),
        (("--output", "new", "--adapter", "nowhere"), "nowhere"),
        ((), "--output FOLDER is missing. Give it, or --push-to OWNER/NAME to upload only."),
        (("--output", "new", "--private"), "--private is for --push-to OWNER/NAME"),
        (("--push-to", "ada/cats"), "ada/cats cannot be uploaded: HF_HUB_OFFLINE"),
    ],
)
def test_mistakes_are_said_in_a_sentence(words: tuple[str, ...], message: str, run_folder: Path, run: Any) -> None:
    outcome = run("export", run_folder, *words)
    assert outcome.code == 2 and message in " ".join(outcome.err.split())
    assert not Path("new").exists()


@pytest.mark.parametrize(("method", "names"), [("F16,q8_0", ["out.F16.gguf", "out.Q8_0.gguf"]),
                                               ("gguf_lora", ["out.LORA.F32.gguf"])])  # fmt: skip
def test_gguf_is_written_and_told(method: str, names: list[str], run_folder: Path, tmp_path: Path, run: Any,
                                  without_llama: None) -> None:  # fmt: skip
    outcome = run("export", run_folder, "--output", tmp_path / "out", "--method", method, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == names
    shown = " ".join(outcome.out.split())
    assert all(name in shown for name in names) and "read again, as in the run" in shown
    if method != "gguf_lora":
        assert "14 Q8_0, 5 F32, 2 F16" in shown and "(4 training rows)" in shown and "KL divergence" in shown
    lines = [line for line in outcome.out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80, lines


@pytest.mark.parametrize(
    ("method", "near"), [("gguf", ""), ("q9_0", " Did you mean 'q"), ("merged", " Did you mean 'm")]
)
def test_an_unknown_method_names_those_of_the_command_line(
    run_folder: Path, tmp_path: Path, run: Any, method: str, near: str
) -> None:
    outcome = run("export", run_folder, "--output", tmp_path / "x", "--method", method)
    assert outcome.code == 2 and outcome.err.startswith(f"error: --method {method}: use merged_16bit")
    assert f"or gguf_lora for the adapter alone.{near}" in outcome.err and "q8_0, q4_k_m, f16" in outcome.err

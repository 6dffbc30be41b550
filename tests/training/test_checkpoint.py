"""Checkpoints that are damaged, foreign, too many or too large."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.training import support

from tunesmith import SFTConfig
from tunesmith.core import files
from tunesmith.core.errors import CheckpointError, OutputError
from tunesmith.training.checkpoint import _check_same_run, checkpoints_in, find_checkpoint, remove_old_checkpoints
from tunesmith.training.fingerprint import settings_fingerprint

STEPS = 4
SETTINGS: dict[str, Any] = {"rows": 16, "save_steps": 1, "save_total_limit": None}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    support.trainer(folder, **SETTINGS).train()
    assert [path.name for path in checkpoints_in(folder)] == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_checkpoint_holds_everything_that_a_run_needs(finished: Path) -> None:
    names = {path.name for path in (finished / "checkpoint-4").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer.pt"}
    assert names >= {"scheduler.pt", "rng_state.pth", "trainer_state.json", "run.json", "manifest.json"}


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (truncate, "optimizer.pt", "optimizer.pt has"),
        (flip, "adapter_model.safetensors", "adapter_model.safetensors has another checksum than when it was written"),
        (flip, "rng_state.pth", "rng_state.pth has another checksum"),
        (Path.unlink, "scheduler.pt", "scheduler.pt is missing"),
        (truncate, "manifest.json", "manifest.json cannot be read"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_message(
    harm: Callable[[Path], None], name: str, said: str, run: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (3, 4):
        harm(run / f"checkpoint-{step}" / name)
    trainer = support.trainer(run, **SETTINGS)
    with caplog.at_level(logging.INFO):
        trainer.train(resume_from_checkpoint=True)
    for step in (3, 4):
        assert f"checkpoint-{step} is damaged ({said}" in caplog.text
    assert f"Resuming from {run / 'checkpoint-2'}" in caplog.text
    last = "checkpoint-4/adapter_model.safetensors"
    # The damaged folders were written anew.
    assert support.digest(run / last) == support.digest(finished / last)
    assert files.damage(run / "checkpoint-4") is None
    assert files.damage(run / "checkpoint-3") is None


def test_when_all_are_damaged_nothing_is_overwritten(run: Path) -> None:
    for path in checkpoints_in(run):
        truncate(path / "trainer_state.json")
    before = support.digest(run / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(CheckpointError, match=r"all 4 checkpoints are damaged. Start the run again with another"):
        support.trainer(run, **SETTINGS).train(resume_from_checkpoint=True)
    assert support.digest(run / "checkpoint-4" / "trainer_state.json") == before


def test_no_byte_of_a_checkpoint_can_change_unseen(run: Path) -> None:
    """Every byte of the small files and a sample of the large ones; the manifest's own bytes too."""
    folder, draw = run / "checkpoint-4", random.Random(2)
    for file in sorted(path for path in folder.iterdir() if path.name != "manifest.json"):
        content = file.read_bytes()
        for position in draw.sample(range(len(content)), min(3, len(content))):
            file.write_bytes(
                content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[position + 1 :]
            )
            assert files.damage(folder) is not None, (file.name, position)
        file.write_bytes(content)
    assert files.damage(folder) is None


def test_a_damaged_manifest_never_raises(run: Path) -> None:
    folder, draw = run / "checkpoint-1", random.Random(3)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for position in draw.sample(range(len(content)), 400):
        manifest.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[position + 1 :]
        )
        found = files.damage(folder)
        assert found is None or isinstance(found, str)
        # Only white space may change without harm.
        assert found is not None or not content[position : position + 1].strip(), position
    for foreign in ("[]", "{}", '{"files": []}', '{"files": {"run.json": 3}}', '{"files": {"run.json": {}}}', "null"):
        manifest.write_text(foreign, encoding="utf-8")
        assert files.damage(folder) is not None, foreign


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 5e-3}, "settings learning_rate: 0.01 then, 0.005 now"),
        ({"seed": 1}, "settings seed: 3407 then, 1 now"),
        ({"per_device_train_batch_size": 2}, "settings per_device_train_batch_size: 4 then, 2 now"),
        ({"rows": 15}, "data train: "),
    ],
)
def test_another_run_is_refused_with_the_difference(run: Path, change: dict[str, Any], difference: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        support.trainer(run, **{**SETTINGS, **change}).train(resume_from_checkpoint=True)
    assert "belongs to another run" in str(caught.value)
    assert difference in str(caught.value)


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (lambda: support.adapted(seed=1), "model weights: "),
        (lambda: support.adapted(r=8), "model adapter.r: 4 then, 8 now"),
        (lambda: support.adapted(lora_dropout=0.1), "model adapter.lora_dropout: 0.0 then, 0.1 now"),
    ],
)
def test_another_model_is_refused_with_the_difference(run: Path, model: Callable[[], Any], difference: str) -> None:
    with pytest.raises(CheckpointError, match=difference):
        support.trainer(run, model=model(), **SETTINGS).train(resume_from_checkpoint=True)


def test_what_changes_no_weight_may_change(run: Path) -> None:
    for step in (2, 3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    trainer = support.trainer(run, **{**SETTINGS, "save_total_limit": 3, "logging_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert [line["step"] for line in support.metrics(run) if "loss" in line] == [1, 2, 4]


def test_another_number_of_readers_is_the_same_run(tmp_path: Path) -> None:
    written, now = (
        settings_fingerprint(SFTConfig(output_dir="x", use_cpu=True, dataset_num_proc=count), 1) for count in (2, 8)
    )
    (tmp_path / "run.json").write_text(json.dumps({"settings": written}), encoding="utf-8")
    _check_same_run(tmp_path, {"settings": now})


def test_a_name_that_another_transformers_has_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": {"seed": 1, "activation_checkpointing": false}}', encoding="utf-8")
    _check_same_run(tmp_path, {"settings": {"seed": 1, "gradient_checkpointing": None}})
    with pytest.raises(CheckpointError, match="settings seed: 1 then, 2 now"):
        _check_same_run(tmp_path, {"settings": {"seed": 2}})


def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = support.trainer(tmp_path, rows=8)
    with caplog.at_level(logging.INFO):
        trainer.train(resume_from_checkpoint=True)
    assert "Resuming from the beginning: there is no checkpoint yet" in caplog.text
    assert trainer.state.global_step == 2


def test_a_checkpoint_by_its_path(run: Path, finished: Path) -> None:
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    support.trainer(run, **SETTINGS).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    last = "checkpoint-4/adapter_model.safetensors"
    assert support.digest(run / last) == support.digest(finished / last)


def test_a_checkpoint_goes_on_in_a_folder_of_its_own(run: Path, tmp_path: Path) -> None:
    trainer = support.trainer(tmp_path / "new", **SETTINGS)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert names(tmp_path / "new") == ["checkpoint-4"]
    # Its step 4 would stay, whatever run it is of.
    with pytest.raises(OutputError, match=r"new already holds checkpoints of a run"):
        support.trainer(tmp_path / "new", **SETTINGS).train(resume_from_checkpoint=str(run / "checkpoint-3"))


def test_the_folder_of_a_run_is_no_checkpoint(run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"run is the folder of a run. Name one of its checkpoints \(checkpoint-1, "
    ):
        support.trainer(run, **SETTINGS).train(resume_from_checkpoint=str(run))


def test_a_run_that_goes_on_has_started_before(tmp_path: Path) -> None:
    settings = {**SETTINGS, "eval_dataset": tiny.chat_rows(4, seed=2), "eval_steps": 2, "eval_on_start": True}
    support.trainer(tmp_path, **settings).train()
    straight = support.metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    support.trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert [line["step"] for line in straight if "eval_loss" in line] == [0, 2, 4]
    assert support.metrics(tmp_path)[:-1] == straight[:-1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (shutil.rmtree, r"there is no checkpoint .*checkpoint-2; in that folder: checkpoint-1, checkpoint-3"),
        (lambda path: truncate(path / "optimizer.pt"), r"checkpoint-2 is damaged \("),
    ],
    ids=["gone", "cut"],
)
def test_a_damaged_checkpoint_by_its_path_is_refused(run: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match=said):
        support.trainer(run, **SETTINGS).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_the_folder_of_another_run_is_refused(run: Path) -> None:
    before = {path: support.digest(path) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"already holds checkpoints of a run. Resume it .* or choose another"):
        support.trainer(run, **SETTINGS).train()
    assert {path: support.digest(path) for path in run.rglob("*") if path.is_file()} == before


def fake_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    fake_checkpoints(tmp_path, 2, 9, 10, 11)
    (tmp_path / ".checkpoint-1.partial-removed").mkdir()
    newest = tmp_path / "checkpoint-11"
    remove_old_checkpoints(newest, keep=None, best=None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    remove_old_checkpoints(newest, keep=2, best=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-10", "checkpoint-11"]
    remove_old_checkpoints(newest, keep=1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]
    for everything in (0, -1):
        remove_old_checkpoints(newest, keep=everything, best=None)
        assert names(tmp_path) == ["checkpoint-11"]


def test_later_checkpoints_of_an_earlier_process_do_not_count(tmp_path: Path) -> None:
    """Or two damaged ones would push out every whole one."""
    fake_checkpoints(tmp_path, 1, 2, 3, 8, 9)
    remove_old_checkpoints(tmp_path / "checkpoint-3", keep=2, best=None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-8", "checkpoint-9"]


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    fake_checkpoints(tmp_path, 3)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-4-old", ".checkpoint-5.partial-7"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["checkpoint-3"]
    assert find_checkpoint(tmp_path / "nothing here", {}) is None


@pytest.fixture
def free_space(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_free(count: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=count)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


def test_a_run_that_cannot_keep_its_checkpoints_does_not_start(
    tmp_path: Path, free_space: Callable[[int], None]
) -> None:
    trainer = support.trainer(tmp_path / "run", rows=8)
    free_space(1000)
    with pytest.raises(OutputError, match=r"keeping checkpoints needs \d+ MiB and the disk of .* has 0 MiB free"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_whole(
    tmp_path: Path, free_space: Callable[[int], None]
) -> None:
    from transformers import TrainerCallback

    class FillAfterTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                free_space(1000)

    trainer = support.trainer(tmp_path / "run", callbacks=[FillAfterTwo()], **SETTINGS)
    with pytest.raises(
        OutputError, match=r"a checkpoint needs \d+ MiB .* Free some space or choose another output_dir"
    ):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    assert files.damage(tmp_path / "run" / "checkpoint-2") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 MiB."""
    import subprocess

    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting a small tmpfs needs root with CAP_SYS_ADMIN: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    trainer = support.trainer(small_disk / "run", **SETTINGS)
    (small_disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 40_000))
    with pytest.raises(OutputError, match=r"needs \d+ MiB and the disk of"):
        trainer.train()
    with pytest.raises(OutputError, match="the disk is full"), files.whole_folder(small_disk / "folder") as folder:
        (folder / "file").write_bytes(b"\0" * 100_000)
    assert not (small_disk / "folder").exists()
    assert [path.name for path in small_disk.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with (
        pytest.raises(OutputError, match="a file of that name is in the way"),
        files.whole_folder(tmp_path / "file" / "run"),
    ):
        pass
    assert json.dumps((tmp_path / "file").read_text(encoding="utf-8")) == '"in the way"'


def test_rows_of_other_order_are_other_data(run: Path) -> None:
    rows = tiny.chat_rows(16)
    with pytest.raises(CheckpointError, match="data train: "):
        support.trainer(run, **{**SETTINGS, "rows": rows[::-1]}).train(resume_from_checkpoint=True)


def test_a_run_at_the_default_rate_can_be_resumed(tmp_path: Path) -> None:
    default = SFTConfig(output_dir=str(tmp_path)).learning_rate
    trainer = support.trainer(tmp_path / "run", learning_rate=default, max_steps=2, save_steps=1)
    trainer.train()
    assert {type(group["lr"]) for group in trainer.optimizer.param_groups} == {float}
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = support.trainer(tmp_path / "run", learning_rate=default, max_steps=2, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_checkpoint_of_another_run_by_its_path_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to another run: settings seed: 3407 then, 1 now"):
        support.trainer(run, **{**SETTINGS, "seed": 1}).train(resume_from_checkpoint=str(run / "checkpoint-1"))


def test_a_run_does_not_go_on_with_another_checkpointing(run: Path) -> None:
    model = support.adapted(use_gradient_checkpointing=True)
    with pytest.raises(CheckpointError, match=r"model checkpointing: .* then, True now"):
        support.trainer(run, model=model, **SETTINGS).train(resume_from_checkpoint=True)

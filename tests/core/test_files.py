from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import ROOT

from tunesmith.core.errors import OutputError
from tunesmith.core.files import (
    MANIFEST,
    damage,
    free_bytes,
    lasting_path,
    lock,
    require_new,
    require_space,
    sha256,
    whole_folder,
    write_text,
)


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as inside:
        (inside / "a.txt").write_text(text, encoding="utf-8")
        (inside / "deep").mkdir()
        (inside / "deep" / "b.bin").write_bytes(bytes(range(256)))


def test_a_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with whole_folder(folder) as inside:
        (inside / "a.txt").write_text("x", encoding="utf-8")
        assert not folder.exists()
        assert inside.parent == folder.parent
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest == {"files": {"a.txt": {"bytes": 1, "sha256": sha256(folder / "a.txt")}}}
    assert damage(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_an_old_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "f", "old")
    (tmp_path / "f" / "left over").write_text("", encoding="utf-8")
    fill(tmp_path / "f", "new")
    assert (tmp_path / "f" / "a.txt").read_text(encoding="utf-8") == "new"
    assert not (tmp_path / "f" / "left over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "f", "old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "f") as inside:
        (inside / "a.txt").write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert (tmp_path / "f" / "a.txt").read_text(encoding="utf-8") == "old"
    assert damage(tmp_path / "f") is None
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_every_kind_of_damage_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    fill(folder, "text")
    content = (folder / "deep" / "b.bin").read_bytes()
    (folder / "deep" / "b.bin").write_bytes(content[:-1])
    assert damage(folder) == "deep/b.bin has 255 bytes, 256 were written"
    (folder / "deep" / "b.bin").write_bytes(content[:-1] + b"\0")
    assert damage(folder) == "deep/b.bin has another checksum than when it was written"
    (folder / "deep" / "b.bin").unlink()
    assert damage(folder) == "deep/b.bin is missing"
    (folder / MANIFEST).write_text("{", encoding="utf-8")
    assert damage(folder) == f"{MANIFEST} cannot be read"
    (folder / MANIFEST).unlink()
    assert damage(folder) == f"{MANIFEST} is missing"
    assert damage(tmp_path / "nothing") == f"{MANIFEST} is missing"


WRITER = """
import sys
from pathlib import Path
from tunesmith.core.files import whole_folder
number = 0
print("ready", flush=True)
while True:
    number += 1
    with whole_folder(Path(sys.argv[1])) as inside:
        for name in "abcd":
            (inside / name).write_text(str(number) * 5000)
"""


def test_a_killed_writer_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for attempt in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 + 0.0037 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        # What the next process does before it reads: start to write, which puts a half replaced folder back.
        with pytest.raises(ZeroDivisionError), whole_folder(folder):
            raise ZeroDivisionError
        assert damage(folder) is None
        assert len({(folder / name).read_text(encoding="utf-8") for name in "abcd"}) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["f"], "partial folders of dead processes are removed"


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    import threading

    inside: list[int] = []
    crowds: list[int] = []

    def work(number: int) -> None:
        with lock(tmp_path / "deep" / "lock"):
            inside.append(number)
            time.sleep(0.02)
            crowds.append(len(inside))
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowds == [1, 1, 1, 1]


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "one")
    write_text(file, "zwei\n")
    assert file.read_text(encoding="utf-8") == "zwei\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_knows_its_name_before_it_has_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as outer, whole_folder(outer / "base") as inner:
        assert lasting_path(inner / "a.txt") == tmp_path / "run" / "base" / "a.txt"
        assert lasting_path(inner) != inner
    assert lasting_path(tmp_path / "run") == tmp_path / "run"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission to write there"):
        fill(tmp_path / "f", "x")
    with pytest.raises(OutputError, match="no permission to write there"):
        write_text(tmp_path / "f", "x")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*file/f: a file of that name is in the way"):
        fill(tmp_path / "file" / "f", "x")
    with pytest.raises(OutputError, match=r"cannot write .*file/f: part of the path is a file"):
        write_text(tmp_path / "file" / "f", "x")


def test_a_new_folder_may_be_there_as_long_as_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("none", "empty"):
        require_new(tmp_path / name)
        with whole_folder(tmp_path / name) as temporary:
            (temporary / "a").write_text("a")
    for name in ("none", "empty", "file", "link"):
        with pytest.raises(OutputError, match=f"{name} is there already. Choose another folder, or remove it first"):
            require_new(tmp_path / name)


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    require_space(tmp_path / "not" / "there", 1, "a test")
    with pytest.raises(OutputError, match=r"a test needs \d+ MiB and the disk of .* has \d+ MiB free. Free some space"):
        require_space(tmp_path, 2**60, "a test")

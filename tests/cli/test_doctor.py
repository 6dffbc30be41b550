import sys

import pytest

from tunesmith.cli.doctor import OPTIONAL, import_state, packages


def test_doctor_prints_versions_machine_and_packages(run):
    import torch

    outcome = run("doctor")
    assert outcome.code == 0
    shown = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    assert torch.__version__.split("+")[0] in shown["torch"]  # a package may be named without its build
    assert "(" in shown["dtype"]  # the reason
    assert {"device", "threads", "memory", "cache", *OPTIONAL} <= set(shown)
    assert {"rms_norm", "attention_varlen"} <= set(shown)
    assert max(len(line.rstrip()) for line in outcome.out.splitlines()) <= 80


def test_a_package_that_works_shows_its_version():
    import gguf  # noqa: F401  (a dependency of ours, so it is here)

    assert import_state("gguf", "gguf").startswith("ok ")


def test_a_missing_package_is_not_installed():
    assert import_state("no_such_module", "no-such-package") == "not installed"


@pytest.mark.parametrize("statement", ["raise OSError('libcuda.so.1: no such file\\nmore')", "import no_such_module"])
def test_a_package_that_breaks_at_import_says_why(tmp_path, monkeypatch, statement):
    (tmp_path / "broken_module.py").write_text(statement)
    information = tmp_path / "broken_package-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    state = import_state("broken_module", "broken-package")
    assert state.startswith("1.2 installed, import fails: ")
    assert "libcuda.so.1" in state or "no_such_module" in state
    assert "more" not in state


def test_vllm_is_found_in_an_environment_of_its_own(tmp_path, monkeypatch):
    if dict(packages())["vllm"] != "not installed":
        pytest.skip("vLLM is here")
    command = tmp_path / "vllm"
    command.write_text("")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(packages())["vllm"] == f"in an environment of its own: {command}"

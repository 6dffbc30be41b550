"""Everything about a GPU in one command: kernels against float64, the device's ceilings, training beside transformers.

    make gpu-check                                      (or python -m benchmarks.gpu_check)
    python -m benchmarks.gpu_check --stages parity,8b   (some stages only)
    python -m benchmarks.gpu_check --dry-run-cpu        (every stage at toy sizes, without a GPU)

Needs a checkout, a CUDA device, torch, triton, transformers and peft: no network, no model, no data, nothing of the
checkout installed. Within ``--minutes`` (9) it prints tables and appends JSON lines to ``gpu_check.jsonl`` in the
folder that ``TUNESMITH_GPU_OUT`` names (``benchmarks/results`` by default). Stages run in processes of their own, so
that one that crashes leaves the others; what does not fit into the time is named in the tables.

Exit code: 0 when all is right, 1 when a kernel is not as accurate as plain torch or a stage failed, 2 when this machine
cannot run it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "triton", "transformers", "peft")
# Stage -> seconds that it may take at most; whatever is left of the whole is less. In order of importance.
_STAGES = {"parity": 120, "ceilings": 60, "8b": 240, "unsloth": 180, "4b": 120, "135m": 100, "graphs": 100, "curve": 60}
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the tables and return the exit code."""
    chosen = _arguments(arguments)
    if chosen.child:
        _run_stages(chosen)
        return 0
    if not chosen.dry_run_cpu and (reason := _cannot_run()):
        print(f"gpu-check cannot run here: {reason}.", file=sys.stderr)
        return 2
    deadline = time.time() + 60 * chosen.minutes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        out.touch()
        # A dry run saves itself the imports of six more processes.
        groups = [chosen.stages] if chosen.dry_run_cpu else [[stage] for stage in chosen.stages]
        failures = [failure for group in groups if (failure := _run_group(group, chosen, out, deadline))]
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    folder = Path(os.environ.get("TUNESMITH_GPU_OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in [*records, *failures])
    print("\n".join(_report(records, failures)))
    print(f"\n{len(records)} records in {folder / 'gpu_check.jsonl'}")
    return int(bool(failures) or any(map(_is_wrong, records)))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stages", default=",".join(_STAGES), help="comma-separated; all by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--dry-run-cpu", action="store_true", help="toy sizes on the CPU: tests this script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.stages = [stage.strip() for stage in found.stages.split(",") if stage.strip()]
    unknown = [stage for stage in found.stages if stage not in _STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(_STAGES)}")
    return found


def _cannot_run() -> str | None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if "torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            return "torch sees no CUDA device (--dry-run-cpu tests the script itself)"
    return f"it needs {', '.join(_PACKAGES)}, and {', '.join(missing)} cannot be imported" if missing else None


# ---- the child ----


def _run_stages(chosen: argparse.Namespace) -> None:
    """Run the stages of one process."""
    if chosen.dry_run_cpu:
        import torch

        # Threads that wait for each other cost more than toy sizes themselves.
        torch.set_num_threads(1)
    for name in chosen.stages:
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        _run_stage(name, chosen.dry_run_cpu, chosen.deadline, Path(chosen.child))


def _run_stage(name: str, is_dry: bool, deadline: float, out: Path) -> None:
    if name == "unsloth" and importlib.util.find_spec("unsloth") is not None:
        import unsloth  # noqa: F401  (before transformers, which it patches)
    from benchmarks.gpu.models import Work
    from benchmarks.gpu.stage import Stage

    stage = Stage(name, is_dry, deadline, out, _environment())
    if name == "parity":
        from benchmarks.gpu import parity

        parity.run(stage)
    elif name == "ceilings":
        from benchmarks.gpu import ceilings

        ceilings.run(stage)
    elif name == "unsloth":
        from benchmarks.gpu import unsloth as arm

        arm.run(stage, "toy-llama" if is_dry else "8b")
    elif name == "graphs":
        from benchmarks.gpu import arms, graphs

        graphs.check(stage)
        arms.short_steps(stage)
    else:
        from benchmarks.gpu import arms

        if name == "curve":
            work = Work("dense", 24, 2) if is_dry else Work("dense", 512, 4)
            arms.curve(stage, "toy-llama" if is_dry else "135m", work, 4 if is_dry else 50)
        else:
            toys = {"8b": "toy-llama", "4b": "toy-qwen3", "135m": "toy-small"}
            arms.headline(stage, toys[name] if is_dry else name)


def _environment() -> Record:
    from benchmarks.record import environment

    found = environment()
    import torch

    for package in ("triton", "unsloth", "unsloth_zoo"):
        if importlib.util.find_spec(package) is not None:
            from importlib.metadata import version

            found["versions"][package] = version(package)
    found["versions"]["cuda"] = torch.version.cuda
    return found


# ---- the parent ----


def _run_group(group: list[str], chosen: argparse.Namespace, out: Path, deadline: float) -> Record | None:
    """Run stages in one process; return a record where it failed."""
    most = sum(_STAGES[stage] for stage in group)
    until = min(deadline, time.time() + most)
    name = ",".join(group)
    if until - time.time() < 5:
        return {"stage": name, "failed": "no time was left"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stages", name, "--child", str(out)]
    command += ["--deadline", str(until), *(["--dry-run-cpu"] if chosen.dry_run_cpu else [])]
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    environment = {**settings, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        # An arm that has begun may end a little later.
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=until - time.time() + 10, check=False)
    except subprocess.TimeoutExpired:
        return {"stage": name, "failed": "stopped: its time was over"}
    return {"stage": name, "failed": f"exit code {done.returncode}"} if done.returncode else None


def _is_wrong(record: Record) -> bool:
    """Return whether something is broken: not where memory was too small, nor where another library failed."""
    if record.get("passes") is False:
        return True
    is_finding = str(record.get("failed", "")).startswith("out of memory") or record["stage"] == "unsloth"
    return "failed" in record and not is_finding


def _report(records: list[Record], failures: list[Record]) -> list[str]:
    lines = [*_parity_lines(records), *_ceiling_lines(records), *_arm_lines(records), *_curve_lines(records)]
    lines += [f"stage {failure['stage']} failed: {failure['failed']}" for failure in failures]
    return lines


def _parity_lines(records: list[Record]) -> list[str]:
    found = [record for record in records if "passes" in record]
    if not found:
        return []
    lines = ["", f"{'kernels against float64':34}{'dtype':>10}{'pass':>10}   largest error beside what is allowed"]
    for op, dtype in dict.fromkeys((record["op"], record["dtype"]) for record in found):
        own = [record for record in found if (record["op"], record["dtype"]) == (op, dtype)]
        results = [result for record in own for result in record.get("results", {}).values() if result["allowed"]]
        worst = max((result["rms"] / result["allowed"] for result in results), default=0.0)
        passed = sum(record["passes"] for record in own)
        lines.append(f"{op:34}{dtype:>10}{f'{passed}/{len(own)}':>10}   {worst:.3f}")
    for record in found:
        if not record["passes"]:
            wrong = {
                name: r for name, r in record.get("results", {}).items()
                if r["rms"] > r["allowed"] or r["worst"] > r["worst_allowed"]
            }  # fmt: skip
            lines.append(f"  wrong: {record['case']}, {record['dtype']}: {record.get('failed') or wrong}")
    return lines


def _ceiling_lines(records: list[Record]) -> list[str]:
    found = [record for record in records if record["stage"] == "ceilings"]
    if not found:
        return []
    lines = ["", f"{'ceilings and kernels':66}{'ms':>10}{'GB/s':>9}{'TFLOP/s':>9}"]
    for record in found:
        if "refused" in record:
            lines.append(f"{record['what']:66} refused: {record['refused'][:60]}")
            continue
        rates = [f"{record[key]:9.1f}" if key in record else " " * 9 for key in ("gb_per_s", "tflops")]
        lines.append(f"{record['what']:66}{record['seconds']['p50'] * 1e3:10.3f}{''.join(rates)}")
    return lines


def _arm_lines(records: list[Record]) -> list[str]:
    found = [record for record in records if "arm" in record]
    products = [
        r["tflops"] for r in records if str(r.get("what", "")).startswith("product of squares") and "tflops" in r
    ]
    lines: list[str] = []
    for model, work in dict.fromkeys((record["model"], record.get("work", "")) for record in found):
        own = [record for record in found if (record["model"], record.get("work", "")) == (model, work)]
        first = next((r for r in own if r["arm"] == "hf" and "tokens_per_s" in r), None)
        lines += [
            "",
            f"{f'{model}, {work}':34}{'tokens/s':>11}{'x hf':>7}{'of GEMM':>9}{'peak GB':>9}{'loss':>9}{'differs':>9}",
        ]
        for record in own:
            name = record["arm"] + (" (again)" if record.get("repeats") else "")
            if "tokens_per_s" not in record:
                kind = next(key for key in ("missing", "failed") if key in record)
                lines.append(f"{name:34} {kind}: {record[kind][:80]}")
                continue
            ratio = f"{record['tokens_per_s'] / first['tokens_per_s']:7.2f}" if first else " " * 7
            share = f"{record['model_tflops'] / products[0]:9.3f}" if products and products[0] else " " * 9
            peak = f"{record['peak_bytes'] / 1e9:9.1f}" if "peak_bytes" in record else " " * 9
            apart = ""
            if first and len(first["losses"]) == len(record["losses"]):
                apart = f"{max(abs(a - b) for a, b in zip(first['losses'], record['losses'], strict=True)):9.5f}"
            lines.append(
                f"{name:34}{record['tokens_per_s']:11,.0f}{ratio}{share}{peak}{record['losses'][-1]:9.4f}{apart}"
            )
    return lines


def _curve_lines(records: list[Record]) -> list[str]:
    return [
        f"\n{record['steps']} steps of {record['model']}, {record['work']}: losses differ by "
        f"{record['largest_difference']:.3%} at most, cosine of the adapters {record['adapter_cosine']:.5f}"
        for record in records
        if "adapter_cosine" in record
    ]


if __name__ == "__main__":
    sys.exit(main())

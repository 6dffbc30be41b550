"""Training speed and memory of tunesmith and its peers, side by side.

    python -m benchmarks.train --arms trl,unsloth,ours,ours-none --device cpu --steps 8 --warmup 2 --loss answers

Every arm runs in a process of its own, peers in the environments of ``make peers``, on the same token ids in the same
order and from the same adapter (``workload.py``): 8 rows a step, LoRA of rank 16 on all linear layers, AdamW at a
constant 2e-4, warm-up steps first. Without ``--dtype`` each library computes in what it chooses itself. The first arm
is repeated last: no difference smaller than theirs means anything. Arms are ``<library>[-<variant>]``; the modules of
``benchmarks/arms`` say which variants there are.

Prints a table, then one JSON line an arm; ``--record`` appends those to ``results/train.jsonl``. This process stays
small on purpose: the peak of a child is at least the size of the parent that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "WORKLOAD", "build_workload", "run_arm", "table"]

ROOT = Path(__file__).parent.parent
WORKLOAD = ROOT / ".cache" / "benchmarks" / "smollm2-135m"
PEERS = {"trl": ".venv-peers", "litgpt": ".venv-peers", "unsloth": ".venv-unsloth"}
"""The environment of each library that is not ours; see the Makefile."""
_SETTINGS = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_arm(
    arm: str, *, workload: Path, log: Path | None = None, limit_s: float | None = None, **job: Any
) -> dict[str, Any]:
    """Run one arm in its own process and return its record.

    The record of an arm that gave no figures holds ``arm`` and the reason under "missing" (a package), "refused" (the
    library does not do it) or "failed".

    Args:
        log: where to keep what the process prints; None drops it.
        limit_s: the arm is stopped when it takes longer, and failed.
        job: steps, warmup, loss, device and dtype; see ``benchmarks.arms.common.Job``.
    """
    library, _, variant = arm.partition("-")
    if not (ROOT / "benchmarks" / "arms" / f"{library}.py").is_file():
        return {"arm": arm, "failed": f"there is no benchmarks/arms/{library}.py"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        task = {"arm": arm, "variant": variant, "workload": str(workload.resolve()), "result": str(result), **job}
        # A GPU that is there would be taken by libraries that choose for themselves.
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}
        paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [_python(library), "-m", f"benchmarks.arms.{library}", json.dumps(task)],
            cwd=folder,  # Unsloth writes generated code where it runs.
            env={**_SETTINGS, **os.environ, **hidden, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            printed, ended = process.communicate(timeout=limit_s)[0], f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            printed, ended = process.communicate()[0], f"stopped after {limit_s:.0f} s"
        if log is not None:
            log.write_text(printed, encoding="utf-8")
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return {"arm": arm, "failed": f"{ended}: {lines[-1] if lines else 'nothing printed'}"}


def table(records: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: speed, its ratio to every peer, memory, last loss and distance of the losses.

    Tokens per second of processor time stand beside those of the clock: they hold on a machine with other work.
    """
    ran = [record for record in records if "tokens_per_s" in record]
    peers: dict[str, float] = {}
    for record in ran:
        if record["arm"].partition("-")[0] in PEERS:
            peers.setdefault(record["arm"], record["tokens_per_s"])
    head = [
        "arm",
        "computes in",
        "tokens/s",
        "per CPU s",
        *(f"x {name}" for name in peers),
        "peak MB",
        "last loss",
        "loss differs",
    ]
    rows = [head]
    for record in records:
        if record not in ran:
            kind = next(name for name in ("missing", "refused", "failed") if name in record)
            rows.append([record["arm"], f"{kind}: {record[kind]}"])
            continue
        speed = record["tokens_per_s"]
        apart = max(abs(a - b) for a, b in zip(record["losses"], ran[0]["losses"], strict=True))
        computes = record["dtype"] + (" (autocast)" if record["precision"]["autocast"] else "")
        ratios = [f"{speed / peer:.2f}" for peer in peers.values()]
        busy = record["tokens"] / sum(record["cpu_s"].values())
        rows.append([record["arm"], computes, f"{speed:.1f}", f"{busy:.1f}", *ratios,
                     f"{record['peak_bytes'] / 1e6:,.0f}", f"{record['losses'][-1]:.4f}", f"{apart:.4f}"])  # fmt: skip
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    return [_line(row, widths) if len(row) == len(head) else f"{row[0]:<{widths[0]}}  {row[1]}" for row in rows]


def _line(row: list[str], widths: list[int]) -> str:
    cells = [
        f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _python(library: str) -> str:
    """Return the interpreter of a library: its own environment's, or this one where that was not made."""
    own = ROOT / PEERS[library] / "bin" / "python" if library in PEERS else None
    return str(own) if own is not None and own.is_file() else sys.executable


def build_workload(folder: Path) -> None:
    """Make the rows of the benchmark in ``folder`` where they are not there yet."""
    if not (folder / "workload.json").is_file():
        print(f"building {folder}")
        command = [sys.executable, "-m", "benchmarks.workload", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arms", default="trl,unsloth,ours", help="comma-separated, in the order to run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--loss", choices=("answers", "all"), default="answers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="force it; otherwise each arm's own choice")
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="folder of benchmarks.workload")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which an arm is stopped")
    parser.add_argument("--logs", type=Path, help="keep what each arm prints in this folder")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/train.jsonl")
    parser.add_argument("--no-repeat", action="store_true", help="do not run the first arm again at the end")
    return parser.parse_args()


def main() -> None:
    """Run the arms, print the table and the JSON lines; exit code 1 when an arm failed."""
    arguments = _arguments()
    build_workload(arguments.workload)
    arms = [arm.strip() for arm in arguments.arms.split(",") if arm.strip()]
    job = {name: getattr(arguments, name) for name in ("workload", "steps", "warmup", "loss", "device", "dtype")}
    order = arms if arguments.no_repeat or len(arms) < 2 else [*arms, arms[0]]
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index, arm in enumerate(order):
        log = None if arguments.logs is None else arguments.logs / f"{index}-{arm}.log"
        print(f"running {arm}", file=sys.stderr, flush=True)
        records.append(run_arm(arm, log=log, limit_s=arguments.limit, **job))
    print("\n".join(table(records)))
    if len(order) > len(arms) and all("tokens_per_s" in record for record in (records[0], records[-1])):
        noise = records[-1]["tokens_per_s"] / records[0]["tokens_per_s"]
        records[-1]["repeats"] = records[0]["arm"]
        print(f"noise: {arms[0]} repeated last gives {noise:.3f} of its first speed")
    lines = [json.dumps(record) for record in records]
    print("\n".join(lines))
    if arguments.record:
        with (ROOT / "benchmarks" / "results" / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    sys.exit(any("failed" in record for record in records))


if __name__ == "__main__":
    main()

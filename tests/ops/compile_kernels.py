"""Compile every Triton kernel for a GPU that need not be there: ``python -m tests.ops.compile_kernels``.

The cases of ``kernel_cases.py`` run with a driver that knows a target and launches nothing, so that each kernel is
compiled as those cases would launch it, in bfloat16, to machine code. Not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from tests.ops.kernel_cases import CASES, Memory
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["compiled", "main"]

TARGET = GPUTarget("cuda", 90, 32)


class _Absent:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiling:
    """Stands for a jitted function, and compiles where that would launch."""

    def __init__(self, function: JITFunction, found: dict[str, Any]) -> None:
        self._function, self._found = function, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            # Block sizes change little; every other constant makes another kernel.
            constants = {k: v for k, v in options.items() if k.isupper() and not k.startswith("BLOCK")}
            name = f"{self._function.__module__.split('.')[-2]}.{self._function.__name__} {constants}"
            if name not in self._found:
                self._found[name] = self._function.run(*arguments, grid=grid, warmup=True, **options)

        return launch


def compiled(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return Triton's compiled kernels by name and constants."""
    driver.set_active(_Absent())
    found: dict[str, Any] = {}
    for op in sorted({case.op for case in CASES} - {"attention_varlen"}):
        module = importlib.import_module(f"tunesmith.ops.{op}.triton")
        kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
        for name, kernel in kernels.items():
            setattr(module, name, _Compiling(kernel, found))
        for case in CASES:
            memory = Memory(dtype, "cpu", 0)
            if case.op == op:
                case.call(module, case.inputs(memory), memory)
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
            if not any(key.startswith(f"{op}.{name} ") for key in found):
                raise AssertionError(f"no case launches {op}.{name}")
    return found


def main() -> None:
    """Compile, and print a line a kernel."""
    for name, kernel in compiled().items():
        print(f"compiled {name}: {len(kernel.asm['cubin'])} bytes of machine code")


if __name__ == "__main__":
    main()

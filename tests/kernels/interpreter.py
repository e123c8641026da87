"""Triton's interpreter in fewer seconds: it takes milliseconds for a line of a row, whether there is such a line or not."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

OPS = ("gated_residual", "gelu", "modulated_norm", "qk_norm")  # whose programs take several lines


def quicken() -> None:
    """Programs of two lines, of which one may be none, instead of up to 16; and the language is patched once a launch, not
    again for every function that a kernel calls."""
    for op in OPS:
        module = importlib.import_module(f"cmt_kernels.{op}.triton")
        for name in {"ROWS", "SUMMED_ROWS"} & vars(module).keys():
            setattr(module, name, 2)
    patch_once()


def patch_once() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    real, patched = interpreter._patch_lang, set[str]()

    class Scope:
        """restore() of what this call patched, if it did."""

        def __init__(self, names: set[str], scope: Any) -> None:
            self.names, self.scope = names, scope

        def restore(self) -> None:
            if self.scope is not None:
                self.scope.restore()
            patched.difference_update(self.names)

    def patch(function: Any) -> Scope:
        seen = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType) and v in (tl, tl.core)}
        new = seen - patched
        patched.update(new)
        return Scope(new, real(function) if new else None)

    interpreter._patch_lang = patch

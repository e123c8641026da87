"""Triton's interpreter in fewer seconds: it takes milliseconds for a line of a row, whether there is such a line or not.

What it computes stays as it is. Left out is what it does again and again: patching the language, copies of shapes and types,
broadcasts to the shape that a block has already.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

OPS = ("gated_residual", "gelu", "modulated_norm", "qk_norm")  # whose programs take several lines


def quicken() -> None:
    """Programs of two lines, of which one may be none, instead of up to 16; no check for integers that overflow, which compiled
    kernels do not have and the kernels' own tests keep; and all of `lighten`. For many calls of one shape."""
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    for op in OPS:
        module = importlib.import_module(f"cmt_kernels.{op}.triton")
        for name in {"ROWS", "SUMMED_ROWS"} & vars(module).keys():
            setattr(module, name, 2)
    lighten()


def lighten() -> None:
    """Everything that changes no program."""
    _patch_once()
    _remember()


def _patch_once() -> None:
    """The language is patched once a launch, not again for every function that a kernel calls."""
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


def _remember() -> None:
    """Types and shapes of blocks are made once; blocks of one shape are not broadcast to it."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    numpy_type, with_element = interpreter._get_np_dtype, tl.block_type.with_element_ty
    broadcast, make = TritonSemantic.broadcast_impl_value, tl.tensor.__init__
    numpy_types: dict[str, Any] = {}
    blocks: dict[tuple[str, str], Any] = {}
    sizes: dict[str, tuple[Any, Any]] = {}  # all three by name: Triton's own tuples are slow to compare

    def known_numpy_type(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    def known_block(self: Any, element: Any) -> Any:
        key = element.name, self.name
        if key not in blocks:
            blocks[key] = with_element(self, element)
        return blocks[key]

    def unless_equal(self: Any, a: Any, b: Any) -> Any:
        same = a.type.is_block() and b.type.is_block() and [*a.type.shape] == [*b.type.shape]
        return (a, b) if same else broadcast(self, a, b)

    def light(self: Any, handle: Any, type: Any) -> None:
        if type.name not in sizes:
            make(self, handle, type)
            sizes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes[type.name]

    interpreter._get_np_dtype = known_numpy_type
    tl.block_type.with_element_ty = known_block
    TritonSemantic.broadcast_impl_value = unless_equal
    if vars(tl.tensor(None, tl.int32)).keys() == {"handle", "shape", "numel", "type", "dtype"}:
        tl.tensor.__init__ = light

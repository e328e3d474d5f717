"""Kernels that are launched before the ones ahead have ended must wait for these themselves, and those that wait for
other GPUs must not have others stand by meanwhile.
"""

import ast
from pathlib import Path

import actors.kernels

TREES = [ast.parse(path.read_text()) for path in Path(actors.kernels.__path__[0]).glob("*.py")]
FUNCTIONS = {f.name: f for tree in TREES for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
WAITS_FOR_PEERS = {"_await_words", "await_flag", "_await_word"}


def _calls(node: ast.AST) -> list[ast.Call]:
    """Of functions by their names, in no order."""
    return [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]


def _called(node: ast.AST) -> set[str]:
    return {call.func.id for call in _calls(node) if isinstance(call.func, ast.Name)}


def _launched_early() -> set[str]:
    """Names of kernels that functions launch, `kernel[grid](...)`, which call `early`."""
    return {
        call.func.value.id
        for function in FUNCTIONS.values()
        if "early" in _called(function)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


def _reached(name: str) -> set[str]:
    """Functions of the kernels that this one calls, and those that they call."""
    found: set[str] = set()
    new = {name}
    while new:
        found |= new
        new = set().union(*(_called(FUNCTIONS[one]) & FUNCTIONS.keys() for one in new)) - found
    return found


def test_every_kernel_that_is_launched_early_waits_for_its_inputs() -> None:
    early = _launched_early()
    assert {"one_row_kernel", "sum_kernel", "draw_kernel"} <= early  # or nothing would be looked into
    assert [name for name in sorted(early) if "await_inputs" not in _called(FUNCTIONS[name])] == []


def test_kernels_that_wait_for_peers_wait_for_their_inputs_first_and_hold_the_next_one() -> None:
    waiting = [FUNCTIONS[name] for name in sorted(_launched_early()) if _reached(name) & WAITS_FOR_PEERS]
    assert len(waiting) == 6
    for kernel in waiting:
        first = kernel.body[1]  # behind the docstring
        assert _called(first) == {"await_inputs"} and "HOLDS_NEXT" in ast.unparse(first), kernel.name


def test_nothing_is_waited_for_behind_the_beginning_of_the_next_kernel() -> None:
    letting = [f for f in FUNCTIONS.values() if "let_next_begin" in _called(f) and f.name != "await_inputs"]
    assert letting
    for kernel in letting:
        waits = [call for call in _calls(kernel) if _reached_by(call) & WAITS_FOR_PEERS]
        (lets,) = [call for call in _calls(kernel) if _reached_by(call) == {"let_next_begin"}]
        assert waits and max(call.lineno for call in waits) < lets.lineno, kernel.name


def _reached_by(call: ast.Call) -> set[str]:
    assert isinstance(call.func, ast.Name)
    return _reached(call.func.id) if call.func.id in FUNCTIONS else set()

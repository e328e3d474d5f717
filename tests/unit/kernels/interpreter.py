"""How a test file runs its kernels in Triton's interpreter.

Triton reads TRITON_INTERPRET when kernels are defined, so they are defined in a process of their own: the file itself,
run as a program.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 100


def run_interpreted(file: str) -> None:
    """Runs a test file as a program; raises AssertionError with what it printed if it fails."""
    done = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def mend_interpreter() -> None:
    """For a file run as a program: lets kernels do what they may on a GPU, and wastes less time."""
    _let_ranges_have_tensor_bounds()
    _know_what_is_built_in()


def _let_ranges_have_tensor_bounds() -> None:
    """Triton 3.6 turns loop bounds into ints in a way that numpy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def _know_what_is_built_in() -> None:
    """Triton looks for it in all of its language at each call of a function: up to a third of the time."""
    from triton import language
    from triton.runtime import interpreter

    core = language.core
    names = {
        place: [name for name, member in inspect.getmembers(place) if core.is_builtin(member)]
        for place in (language, core, language.math, core.tensor, core.tensor_descriptor_base)
    }

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        for name in names[place]:
            member = getattr(place, name)
            if core.is_builtin(member):  # else it is patched already, by a function that called this one
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin

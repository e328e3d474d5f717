"""How a test file runs its kernels in Triton's interpreter.

Triton reads TRITON_INTERPRET when kernels are defined, so they are defined in a process of their own: the file itself,
run as a program.
"""

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


def let_ranges_have_tensor_bounds() -> None:
    """Triton 3.6 turns loop bounds into ints in a way that numpy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend

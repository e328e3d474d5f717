"""Engines whose ranks are forked from a process that has imported what they need: anew, it takes each of them three
seconds of a core, and a test runs for less.
"""

import multiprocessing
import os
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Engine
from cluster.rank_environment import RANK_ENVIRONMENT

_IMPORTED = ["pytest", "cluster.local_fleet", "actors.dispatch.collective"]


@cache
def forking() -> multiprocessing.context.ForkServerContext:
    """Starts processes that inherit the variables of a rank's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RANK_ENVIRONMENT.items():
            patch.setitem(os.environ, name, value)
        forkserver.ensure_running()
    return context


def forked_engine(directory: Path, **settings: Any) -> Engine:
    """An engine on CPUs that has not begun."""
    engine = Engine(directory, **settings)
    engine.fleet.context = forking()
    return engine

"""The service that most integration tests share."""

from collections.abc import Iterator

import pytest
from service import Service, launch, stop


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """1A+1E over gloo behind HAProxy: every part of the pipeline in a process of its own, the last of its kind."""
    flags = ["--layout", "disaggregated", "--attention-ranks", "1", "--expert-ranks", "1", "--threads-per-rank", "1"]
    running = launch(tmp_path_factory.mktemp("service"), "shape:tiny", flags)
    yield running
    stop(running)

"""Shared fixtures. Unit tests may not start Ray."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "unit" not in Path(request.node.path).parts:
        return
    import ray

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test tried to start Ray")

    monkeypatch.setattr(ray, "init", refuse)

"""Kernels run in Triton's interpreter, whose versions differ in what they can do: these were written with 3.6."""

import importlib.metadata

import pytest

VERSION = "3.6"


def _installed() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    installed = _installed()
    for item in items:
        if item.path.stem.endswith("_interpreted") and not installed.startswith(VERSION):
            item.add_marker(pytest.mark.skip(reason=f"needs Triton {VERSION}, there is {installed}"))

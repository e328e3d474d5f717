"""GPU tests need CUDA devices; without them they are skipped, with the reason."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("gpu")
        needed = marker.kwargs.get("devices", 1) if marker else 0
        have = torch.cuda.device_count()
        if needed > have:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), there are {have}"))

"""Sets the bounds of a pipeline that runs, as `serve deploy` with other ones does, one JSON object per line of stdin.

A process of its own, since whoever joins a service's Ray has files of it open and ends with it. Answers each line with
`ok` once a router has taken the keys of ScalingConfig in it, which count until that router dies.

    echo '{"min_experts": 3, "max_experts": 4}' | python -m benchmarks.bounds 18200
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster.private_ray import join_environment
from cluster.session import Session, StateFolder

TIMEOUT_S = 60.0


def session_of(port: int) -> Session:
    """The service on that HTTP port, once it has told where its Ray is."""
    while (session := StateFolder(port).read()) is None or not session.ray_address:
        time.sleep(0.1)
    return session


def main() -> None:
    session = session_of(int(sys.argv[1]))
    join_environment(os.environ, Path(session.scratch) / "token")
    import ray  # reads the environment as it is now

    ray.init(address=session.ray_address, namespace="corral", log_to_driver=False)
    asyncio.run(obey())


async def obey() -> None:
    """In one loop, in which Serve keeps to know which router lives."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        await set_bounds(json.loads(line))
        print("ok", flush=True)


async def set_bounds(bounds: dict[str, Any]) -> None:
    """Raises TimeoutError if no router takes them."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    async def ask() -> None:
        await serve.get_deployment_handle("Router", app_name="corral").reconfigure.remote(bounds)

    ends_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends_s:
        try:
            return await asyncio.wait_for(ask(), TIMEOUT_S / 6)
        except (RayError, RayServeException, TimeoutError):  # it was killed just now
            await asyncio.sleep(0.5)
    raise TimeoutError(f"no router took {bounds}")


if __name__ == "__main__":
    main()

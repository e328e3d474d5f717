"""What the router and Ray say of themselves, as a line of JSON about twice a second; runs on the head of a cluster.

`router` is the pipeline's snapshot (empty while no router answers), `nodes` the addresses of Ray's living nodes.
"""

import asyncio
import json
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

PERIOD_S = 0.5
ANSWER_TIMEOUT_S = 5.0


async def main() -> None:
    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    router = serve.get_deployment_handle("Router", "corral")
    while True:
        snapshot: dict[str, Any] = {}
        with suppress(RayServeException, ray.exceptions.RayError, TimeoutError):
            snapshot = await asyncio.wait_for(router.snapshot.remote(), ANSWER_TIMEOUT_S)
        nodes = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        print(json.dumps({"router": {**snapshot, "expert_tokens": None}, "nodes": nodes}), flush=True)
        await asyncio.sleep(PERIOD_S)


if __name__ == "__main__":
    asyncio.run(main())

"""The Serve application that deploy/*.yaml names as `actors.app:build`.

Owns the wiring of ingress and router. Unknown keys anywhere in `args` are errors.
"""

from typing import Any

from ray.serve import Application

from actors.config import PipelineConfig
from actors.errors import ConfigError
from actors.ingress.deployment import IngressDeployment
from actors.router.deployment import RouterDeployment


def build(args: dict[str, Any]) -> Application:
    """args: `pipeline` (keys of PipelineConfig) and `ingress` (keys of IngressConfig), both optional."""
    for key in args:
        if key not in ("pipeline", "ingress"):
            raise ConfigError(key, "unknown key; known are ingress, pipeline")
    pipeline = PipelineConfig.parse(args.get("pipeline") or {})
    router = RouterDeployment.bind(pipeline.as_dict())  # type: ignore[attr-defined]
    return IngressDeployment.bind(router, args.get("ingress") or {})  # type: ignore[attr-defined,no-any-return]

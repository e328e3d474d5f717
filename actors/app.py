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
    return build_with(args)


def build_with(args: dict[str, Any], **ingress_options: Any) -> Application:
    """The same, with options of Serve's for the ingress, which a deploy file states under `deployments`."""
    for key in args:
        if key not in ("pipeline", "ingress"):
            raise ConfigError(key, "unknown key; known are ingress, pipeline")
    pipeline = PipelineConfig.parse(args.get("pipeline") or {})
    router = RouterDeployment.bind(pipeline.as_dict())  # type: ignore[attr-defined]
    ingress = IngressDeployment.options(**ingress_options)  # type: ignore[attr-defined]
    return ingress.bind(router, args.get("ingress") or {})  # type: ignore[no-any-return]

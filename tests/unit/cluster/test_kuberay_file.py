"""deploy/kuberay.yaml against what it must agree with: Serve's schema, ours, deploy/maverick.yaml, node_env.sh.

KubeRay's own schema is its custom resource definition, a megabyte that is not ours to keep.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.checkpoint.shapes import SHAPES, shape_config
from actors.config import IngressConfig, PipelineConfig, ScalingConfig
from cluster.hardware import parse_machines
from cluster.layout import resolve

ROOT = Path(__file__).parents[3]
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
CLUSTER: dict[str, Any] = SERVICE["spec"]["rayClusterConfig"]
SERVE: dict[str, Any] = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
GROUPS: dict[str, dict[str, Any]] = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def application() -> dict[str, Any]:
    (only,) = SERVE["applications"]
    found: dict[str, Any] = only
    return found


def scaling() -> ScalingConfig:
    (router,) = (entry for entry in application()["deployments"] if entry["name"] == "Router")
    return ScalingConfig.parse(router["user_config"])


def test_it_is_a_ray_service_of_our_version_with_token_and_autoscaler() -> None:
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert CLUSTER["rayVersion"] == ray.__version__
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert CLUSTER["enableInTreeAutoscaling"] is True and CLUSTER["autoscalerOptions"]["version"] == "v2"


def test_what_it_serves_fits_the_schemas() -> None:
    assert set(SERVE) <= set(ServeDeploySchema.model_fields)  # Serve itself lets unknown keys pass
    ServeDeploySchema.model_validate(SERVE)
    PipelineConfig.parse(application()["args"]["pipeline"])
    IngressConfig.parse(application()["args"].get("ingress", {}))
    scaling()


def without_placement(config: dict[str, Any]) -> dict[str, Any]:
    """A Serve configuration without bounds of scaling, and without the pods that a rank goes to."""
    config = deepcopy(config)
    (only,) = config["applications"]
    only["deployments"] = [entry for entry in only["deployments"] if entry["name"] != "Router"]
    for key in ("attention_resources", "expert_resources"):
        only["args"]["pipeline"].pop(key, None)
    return config


def test_it_serves_what_maverick_yaml_serves() -> None:
    expected = yaml.safe_load((ROOT / "deploy" / "maverick.yaml").read_text())
    assert without_placement(SERVE) == without_placement(expected)


@pytest.mark.parametrize(("group", "role"), [("attention", "attention"), ("experts", "expert")])
def test_every_rank_between_the_bounds_has_its_gpu(group: str, role: str) -> None:
    pipeline = PipelineConfig.parse(application()["args"]["pipeline"])
    asked: dict[str, float] = getattr(pipeline, f"{role}_resources")
    bounds = scaling()
    low, high = {
        "attention": (bounds.min_attention, bounds.max_attention),
        "expert": (bounds.min_experts, bounds.max_experts),
    }[role]
    pods = GROUPS[group]
    (name, each), *none = asked.items()
    offered: float = json.loads(json.loads(pods["rayStartParams"]["resources"]))[name]
    limits = container(pods)["resources"]["limits"]
    assert not none and offered / each == float(limits["nvidia.com/gpu"])
    assert pods["minReplicas"] * offered >= low * each > (pods["minReplicas"] - 1) * offered
    assert pods["maxReplicas"] * offered >= high * each
    assert low == getattr(pipeline, f"{role}_ranks")


def test_the_model_fits_the_pods_that_it_starts_with() -> None:
    pipeline = PipelineConfig.parse(application()["args"]["pipeline"])
    gpus = sum(group["minReplicas"] * int(container(group)["resources"]["limits"]["nvidia.com/gpu"])
               for group in GROUPS.values())  # fmt: skip
    plan = resolve(pipeline, shape_config(SHAPES["maverick"], experts="fp8"), parse_machines(f"{gpus // 4}x4xH200"))
    assert str(plan.split) == "4A+12E"


def test_pods_have_the_environment_of_nodes() -> None:
    exported = dict(re.findall(r"^export (\w+)=(.*)$", (ROOT / "cluster" / "node_env.sh").read_text(), re.MULTILINE))
    ours = {name: value for name, value in exported.items() if "$HOME" not in value and "AUTH" not in name}
    assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_health_check_period_ms"} <= set(ours)
    for group in (CLUSTER["headGroupSpec"], *GROUPS.values()):
        assert {entry["name"]: entry["value"] for entry in container(group)["env"]} == ours


def test_clients_and_prometheus_find_their_ports() -> None:
    head = {port["name"]: port["containerPort"] for port in container(CLUSTER["headGroupSpec"])["ports"]}
    assert head["serve"] == SERVE["http_options"]["port"]  # KubeRay's service has ports named serve and serve-…
    assert head["serve-grpc"] == SERVE["grpc_options"]["port"]
    assert head["dashboard"] == 8265 and head["gcs-server"] == 6379
    for group in (CLUSTER["headGroupSpec"], *GROUPS.values()):
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]


def test_the_checkpoint_is_where_the_pipeline_looks() -> None:
    model = application()["args"]["pipeline"]["model"]
    for group in (CLUSTER["headGroupSpec"], *GROUPS.values()):
        (mount,) = container(group)["volumeMounts"]
        assert model.startswith(mount["mountPath"] + "/") and mount["readOnly"]
        assert mount["name"] in {volume["name"] for volume in group["template"]["spec"]["volumes"]}

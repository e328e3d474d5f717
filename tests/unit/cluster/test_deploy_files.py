"""The YAML that operators start from, against the schemas of those who read it: Serve, Ray's autoscaler, and us."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.shapes import SHAPES, shape_config
from actors.config import IngressConfig, PipelineConfig
from actors.errors import ConfigError
from cluster.hardware import parse_machines
from cluster.layout import resolve

ROOT = Path(__file__).parents[3]
NOT_FOR_SERVE = {"kuberay.yaml", "alerts.yaml"}  # they have tests of their own
DEPLOY = sorted(path for path in (ROOT / "deploy").glob("*.yaml") if path.name not in NOT_FOR_SERVE)
CLUSTER = sorted((ROOT / "cluster").glob("*.yaml"))
SCOUT = shape_config(SHAPES["scout"])
MAVERICK_FP8 = shape_config(SHAPES["maverick"], experts="fp8")


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def _pipeline(name: str) -> PipelineConfig:
    return PipelineConfig.parse(_read(ROOT / "deploy" / name)["applications"][0]["args"]["pipeline"])


def test_the_files_are_there() -> None:
    assert {p.name for p in DEPLOY} == {
        "local.yaml", "local-tls.yaml", "scout.yaml", "maverick.yaml", "maverick-4xh200.yaml",
    }  # fmt: skip
    assert {p.name for p in CLUSTER} == {"local.yaml", "aws.yaml", "gcp.yaml"}


@pytest.mark.parametrize("path", DEPLOY, ids=lambda p: p.name)
def test_deploy_files_fit_the_schemas(path: Path) -> None:
    values = _read(path)
    schema = ServeDeploySchema.model_validate(values)
    assert set(values) <= set(ServeDeploySchema.model_fields)  # Serve itself lets unknown keys pass
    (application,) = schema.applications
    assert (application.name, application.import_path) == ("corral", "actors.app:build")
    assert set(application.args) <= {"pipeline", "ingress"}
    PipelineConfig.parse(application.args["pipeline"])
    IngressConfig.parse(application.args.get("ingress", {}))


@pytest.mark.parametrize("path", DEPLOY, ids=lambda p: p.name)
def test_servicers_of_deploy_files_can_be_imported(path: Path) -> None:
    functions = _read(path)["grpc_options"]["grpc_servicer_functions"]
    assert all(callable(import_attr(function)) for function in functions)
    tls = [function for function in functions if function.startswith("actors.ingress.tls:")]
    services = ["actors.ingress.servicers.add_inference", "actors.ingress.servicers.add_health"]
    assert functions == tls + services  # what guards services comes before them
    assert bool(tls) == ("ssl_certfile" in _read(path)["http_options"]) == (path.name == "local-tls.yaml")


def test_an_unknown_key_of_a_pipeline_is_refused() -> None:
    pipeline = _read(ROOT / "deploy" / "local.yaml")["applications"][0]["args"]["pipeline"]
    with pytest.raises(ConfigError, match="max_modle_len"):
        PipelineConfig.parse(pipeline | {"max_modle_len": 1})


@pytest.mark.parametrize(
    ("name", "model", "machines", "layout"),
    [
        ("local.yaml", read_model_config(ROOT / "deploy" / "demo-model"), "cpu", "1A+1E"),
        ("scout.yaml", SCOUT, "2xH200", "colocated 2 TP2 sliced"),
        ("maverick.yaml", MAVERICK_FP8, "2x8xH200", "4A+12E"),
        ("maverick-4xh200.yaml", MAVERICK_FP8, "4xH200", "colocated 4 TP4 sliced"),
    ],
)
def test_deploy_files_fit_the_machines_that_they_name(
    name: str, model: ModelConfig, machines: str, layout: str
) -> None:
    assert str(resolve(_pipeline(name), model, parse_machines(machines)).split) == layout


@pytest.mark.parametrize("path", CLUSTER, ids=lambda p: p.name)
def test_cluster_files_fit_the_autoscalers_schema(path: Path) -> None:
    config = prepare_config(_read(path))
    validate_config(config)
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("pip install" in command and command.endswith("~/corral") for command in commands)
        assert any("node_env.sh" in command and ".bashrc" in command for command in commands)
    (start,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start and "--disable-usage-stats" in start
    (start,) = (command for command in config["worker_start_ray_commands"] if "ray start" in command)
    assert "--address=$RAY_HEAD_IP:6379" in start and "--disable-usage-stats" in start


@pytest.mark.parametrize("path", CLUSTER, ids=lambda p: p.name)
def test_cluster_files_carry_what_the_package_needs(path: Path) -> None:
    mounts = _read(path)["file_mounts"]
    assert all((ROOT / source).exists() for source in mounts.values() if not source.startswith("~"))
    project = (ROOT / "pyproject.toml").read_text()
    needed = {"actors", "cluster", "protos", "deploy", "pyproject.toml", "README.md"}
    assert needed <= set(mounts.values()) and 'readme = "README.md"' in project


def test_nodes_have_token_health_checks_and_haproxy_and_report_no_usage(tmp_path: Path) -> None:
    script = ROOT / "cluster" / "node_env.sh"
    foreign = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_ADDRESS": "elsewhere:1", "RAY_AUTH_TOKEN": "old"}
    result = subprocess.run(
        ["bash", "-euc", f". {script}; env"], env=foreign, capture_output=True, text=True, check=True, timeout=20
    )
    environment = dict(line.partition("=")[::2] for line in result.stdout.splitlines())
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} & set(environment)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.corral/ray-token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_health_check_failure_threshold"] == "3"
    assert environment["PATH"].startswith(f"{tmp_path}/.corral/venv/bin:")

"""What Serve is told to run: unknown keys are refused, and one machine has as many ingresses as it has cores for."""

import pytest

from actors.app import build, build_with
from actors.errors import ConfigError
from cluster.servemain import num_ingresses


def test_options_reach_the_ingress_and_a_deploy_file_finds_the_default() -> None:
    args = {"pipeline": {"model": "demo"}, "ingress": {"max_n": 2}}
    several, one = build_with(args, num_replicas=3), build(args)
    assert [app._bound_deployment.num_replicas for app in (several, one)] == [3, 1]
    assert several._bound_deployment.name == one._bound_deployment.name == "Ingress"


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="ingres: unknown key"):
        build({"ingres": {}})


def test_small_machines_have_one_ingress_and_large_ones_few() -> None:
    assert [num_ingresses(cores) for cores in (1, 2, 8, 16, 31, 32, 64, 192)] == [1, 1, 1, 2, 3, 4, 4, 4]

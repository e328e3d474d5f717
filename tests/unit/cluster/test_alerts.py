"""deploy/alerts.yaml: alarms ask for metrics that exist, under the names that Ray gives them, and are explained."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

ROOT = Path(__file__).parents[3]
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]


def scraped_names() -> set[str]:
    """docs/metrics.md's table, as Prometheus sees it."""
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    rows = re.findall(r"^\| `(corral_\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    return {f"ray_{name}{suffix}" for name, kind in rows for suffix in suffixes[kind]}


def autoscaler_names() -> set[str]:
    metrics = vars(AutoscalerPrometheusMetrics(session_name="s")).values()
    return {family.name for metric in metrics if hasattr(metric, "collect") for family in metric.collect()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alarms_ask_for_metrics_that_exist(rule: dict[str, Any]) -> None:
    names = set(re.findall(r"\b(?:ray|autoscaler)_\w+", rule["expr"]))
    assert names and names <= scraped_names() | autoscaler_names()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alarms_are_explained(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
    assert f"| `{rule['alert']}` |" in (ROOT / "docs" / "operations.md").read_text()


def test_outcomes_are_those_that_calls_end_with() -> None:
    from actors.ingress.status import TABLE

    known = {"ok"} | {status.grpc.name.lower() for status in TABLE.values()}
    for rule in RULES:
        for outcomes in re.findall(r'outcome=~?"([^"]+)"', rule["expr"]):
            assert set(outcomes.split("|")) <= known

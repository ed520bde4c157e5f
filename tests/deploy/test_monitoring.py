"""Dashboard, alert rules and the autoscaler's metric: what they ask for is there, and they say what they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from ood_runners.telemetry import metrics
from tests.deploy.exposed import ADAPTER, ALERTS, MONITORING, metrics_asked_for, rules
from tests.deploy.rendered import DEPLOY

HERE = Path(__file__).parent
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not here"
)


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_metric_asked_for_is_one_of_the_service() -> None:
    exposed = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            [family] = metric.describe()
            labels = {*metric._labelnames, *(("le",) if family.type == "histogram" else ())}
            exposed |= {family.name + ending: labels for ending in SAMPLES[family.type]}
    asked = {name: labels for name, labels in metrics_asked_for().items() if name.startswith("ood_")}
    assert asked.keys() <= exposed.keys()
    for name, labels in asked.items():
        assert labels <= exposed[name], name
    # And there is a place for each that the service has.
    assert {
        metric.describe()[0].name for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)
    } <= {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}


def test_recorded_names_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for rule in rules() for name in re.findall(r"ood:[a-z0-9:]+", rule["expr"])} == recorded


def test_the_operator_gets_the_same_rules() -> None:
    operator = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    assert operator["kind"] == "PrometheusRule"
    assert operator["spec"] == yaml.safe_load(ALERTS.read_text())


def test_panels_are_in_place_and_use_the_chosen_datasource() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@needs_promtool
def test_alerts_wake_when_they_should_and_not_otherwise() -> None:
    promtool("check", "rules", str(ALERTS))
    promtool("test", "rules", str(HERE / "alerts_test.yaml"))


def test_each_alert_is_seen_to_wake_and_to_be_silent() -> None:
    cases = yaml.safe_load((HERE / "alerts_test.yaml").read_text())["tests"]
    asked = [(one["alertname"], bool(one.get("exp_alerts"))) for case in cases for one in case["alert_rule_test"]]
    names = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {name for name, wakes in asked if wakes} == names == {name for name, wakes in asked if not wakes}


@needs_promtool
@pytest.mark.parametrize(
    "selector, seconds", [('namespace="line"', 0.4), ('namespace="line", stage="vae"', 0.1), ('namespace="none"', 0)]
)
def test_the_autoscaler_sees_the_longest_line(tmp_path: Path, selector: str, seconds: float) -> None:
    [rule] = yaml.safe_load(ADAPTER.read_text())["rules"]["external"]
    series = {
        'ood_queue_seconds_sum{namespace="line", stage="vae", pod="a"}': "0+6x10",
        'ood_queue_seconds_count{namespace="line", stage="vae", pod="a"}': "0+60x10",
        'ood_queue_seconds_sum{namespace="line", stage="features", pod="a"}': "0+12x10",
        'ood_queue_seconds_count{namespace="line", stage="features", pod="a"}': "0+60x10",
        'ood_queue_seconds_sum{namespace="line", stage="features", pod="b"}': "0+36x10",
        'ood_queue_seconds_count{namespace="line", stage="features", pod="b"}': "0+60x10",
        'ood_queue_seconds_sum{namespace="line", stage="mahalanobis", pod="b"}': "7x10",  # none came lately
        'ood_queue_seconds_count{namespace="line", stage="mahalanobis", pod="b"}': "9x10",
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": rule["metricsQuery"].replace("<<.LabelMatchers>>", selector),
                "eval_time": "8m",
                "exp_samples": [{"labels": "{}", "value": seconds}],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", str(tmp_path / "test.yaml"))


def test_the_documentation_names_every_alert() -> None:
    page = (DEPLOY.parent / "docs" / "kubernetes.md").read_text()
    assert re.findall(r"^\| `(OOD\w+)` \|", page, re.MULTILINE) == [
        rule["alert"] for rule in rules() if "alert" in rule
    ]

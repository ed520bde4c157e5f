"""What the dashboard, the alert rules and the autoscaler ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.rendered import DEPLOY, KUBERNETES

MONITORING = KUBERNETES / "components" / "monitoring"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
ADAPTER = DEPLOY / "prometheus" / "adapter.yaml"
_METRIC = re.compile(r"\b(?:ood|bentoml_service)_[a-z_]+")
_SELECTOR = re.compile(r"\b((?:ood|bentoml_service)_[a-z_]+)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
# Prometheus itself adds these where it finds its targets.
FOUND = {"namespace", "pod", "instance", "job"}


def rules() -> list[dict[str, Any]]:
    """The recording and alerting rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    """Every expression."""
    yield from (rule["expr"] for rule in rules())
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", []))
    yield from (one["query"]["query"] for one in dashboard["templating"]["list"] if isinstance(one["query"], dict))
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["external"]:
        yield rule["seriesQuery"]
        yield rule["metricsQuery"].replace("<<.LabelMatchers>>", 'stage="features"')


def metrics_asked_for() -> dict[str, set[str]]:
    """Each metric that is asked for, with the labels that it is selected by, those that Prometheus adds left out."""
    asked: dict[str, set[str]] = {}
    for query in queries():
        for name in _METRIC.findall(query):
            asked.setdefault(name, set())
        for name, selector in _SELECTOR.findall(query):
            asked[name] |= set(_LABEL.findall(selector)) - FOUND
    return asked

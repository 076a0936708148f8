"""Alert rules and dashboard of deploy/: every metric and label that they name exists."""

import json
import re

import pytest
from conftest import ROOT

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("yaml", reason="no PyYAML: the alert rules are not read")

import yaml
from prometheus_client.parser import text_string_to_metric_families

from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.settings import Settings

WORDS = {"by", "le", "sum", "rate", "increase", "histogram_quantile", "label_values"}
"""Words of the expressions that are functions of PromQL and Grafana, or keywords."""

GIVEN = {"up": {"job", "instance"}}
"""Prometheus' own metric; it adds these labels to all others, too."""


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Name of each metric of a service -> the labels of its samples."""
    service = Service(Settings(state=tmp_path_factory.mktemp("metrics")))
    metrics = service.metrics
    metrics.requests.labels("/", "GET", "200").inc()
    metrics.request_seconds.labels("/").observe(0.1)
    metrics.live_frames.labels("decoded").inc()
    with metrics.model("tiny", "1").request():
        pass
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def rules():
    """The alert rules, in the order of the file."""
    document = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))


def unknown(expression, metrics):
    """What an expression names that the service does not have: metrics, and labels of them."""
    known = {**metrics, **GIVEN}
    plain = re.sub(r'"[^"]*"', '""', expression)
    named = set(re.findall(r"(?<![\w$.\[])[a-z_]\w*", re.sub(r"[{(][^{}()]*[})]", inner, plain)))
    used = {name for name in re.findall(r"\b[a-z_]\w*", plain) if name in known}
    labels = {label for name in used for label in known[name]} | GIVEN["up"]
    asked = set(re.findall(r'(\w+)\s*[=!][=~]?\s*""', plain))
    for group in re.findall(r"\bby \(([^)]*)\)", plain):
        asked |= {label.strip() for label in group.split(",")}
    return (named - WORDS - set(known) - labels) | (asked - labels)


def inner(match):
    """Labels in braces are looked at apart; what is in parentheses stays."""
    return "" if match[0].startswith("{") else match[0]


def test_what_is_unknown_is_found(metrics):
    right = 'sum by (le, route) (rate(kgrc_request_seconds_bucket{instance=~"a"}[5m])) > 0.5'
    assert unknown(right, metrics) == set()
    assert unknown("rate(kgrc_refused[5m])", metrics) == {"kgrc_refused"}
    assert unknown('kgrc_requests_total{code="500"}', metrics) == {"code"}
    assert unknown("sum by (program) (rate(nv_inference_count[5m]))", metrics) == {"program"}


def test_the_alerts_name_what_the_service_has(metrics):
    assert len({rule["alert"] for rule in rules()}) == len(rules()) > 5
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert unknown(rule["expr"], metrics) == set(), rule["alert"]


def test_the_dashboard_names_what_the_service_has(metrics):
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    for panel in panels:
        for target in panel["targets"]:
            assert unknown(target["expr"], metrics) == set(), panel["title"]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert not [s for s in shown if unknown(f"sum by ({s}) ({target['expr']})", metrics)]
    (variable,) = [v for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    assert unknown(variable["query"], metrics) == set()

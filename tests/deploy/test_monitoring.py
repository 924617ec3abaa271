"""Dashboard and alerts against the server that they are about: each metric and label that they name
is one that it emits. `promtool` is not at hand; promql-parser reads the expressions.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.engine.types import ModelInfo
from server.ledger.records import LedgerStats
from server.metrics.series import Metrics
from server.settings import Settings
from tests.server.api.conftest import serve
from tests.server.api.fake import BASE, FakeEngine

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
PROMETHEUS = {"up": {"instance", "job"}}  # metrics that Prometheus makes itself
ADDED = {"instance", "job"}  # labels that Prometheus adds
SEVERITIES = {"critical", "warning", "info"}
GRID_WIDTH = 24
Labels = dict[str, set[str]]


class HotEngine(FakeEngine):
    """With whole weights of each variant."""

    def models(self) -> list[ModelInfo]:
        return [replace(info, reconstructed_bytes=100) for info in super().models()]


@dataclass(frozen=True)
class Expression:
    """One PromQL expression; legend: the labels that are shown of its result."""

    where: str
    text: str
    legend: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "impart.json").read_text())


@pytest.fixture(scope="module")
def groups() -> Any:
    return yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]


@pytest.fixture(scope="module")
def emitted() -> Labels:
    """Labels by metric, scraped from a server that has seen one of everything."""
    engine, metrics = HotEngine(), Metrics()
    metrics.watch(engine, 8)
    metrics.on_step(3, 1)
    metrics.on_loaded("alpha", 0.1)
    for event in ("load_failed", "promoted", "demoted", "reconstruct_failed"):
        getattr(metrics, f"on_{event}")("alpha")
    metrics.rejected()
    metrics.watch_ledger(Mock(stats=lambda: LedgerStats(1, 2, 3, 4)))
    metrics.tenants.answered("a", 429, "rate")
    metrics.sequence("alpha", "a", 3, time.monotonic()).finish("stop")
    body = {"model": BASE, "prompt": "Hi", "max_tokens": 2}
    with serve(engine, metrics=metrics) as url:
        httpx.post(f"{url}/v1/completions", json=body).raise_for_status()
        page = httpx.get(f"{url}/metrics").text
    found: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not sample.name.endswith("_created"):  # the process turns those off
                found[sample.name] |= sample.labels.keys()
    return dict(found)


def expressions(dashboard: Any, groups: Any) -> Iterator[Expression]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            legend = frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            text = target["expr"].replace("$__rate_interval", "5m")
            yield Expression(panel["title"], text, legend)
    for rule in (rule for group in groups for rule in group["rules"]):
        shown = " ".join(rule["annotations"].values())
        legend = frozenset(re.findall(r"\$labels\.(\w+)", shown))
        yield Expression(rule["alert"], rule["expr"], legend)


def nodes(node: Any) -> Iterator[Any]:
    """An expression and all in it."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        if (child := getattr(node, name, None)) is not None:
            yield from nodes(child)
    for child in getattr(node, "args", None) or ():
        yield from nodes(child)


def selectors(node: Any) -> Iterator[Any]:
    return (found for found in nodes(node) if isinstance(found, promql_parser.VectorSelector))


def wrong_in(expression: Expression, emitted: Labels) -> Iterator[str]:
    """What it names that there is not."""
    known = emitted | PROMETHEUS
    tree = promql_parser.parse(expression.text)
    for selector in selectors(tree):
        if selector.name not in known:
            yield f"{expression.where}: no metric {selector.name}"
            continue
        labels = known[selector.name] | ADDED
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                yield f"{expression.where}: {selector.name} has no label {matcher.name}"
    for node in nodes(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            for label in set(node.modifier.labels) - labels_of(node.expr, known):
                yield f"{expression.where}: nothing to sum by {label}"
    for label in expression.legend - labels_of(tree, known):
        yield f"{expression.where}: the result has no label {label}"


def labels_of(node: Any, known: Labels) -> set[str]:
    """Labels that the result of an expression may have."""
    if isinstance(node, promql_parser.AggregateExpr):
        return set(node.modifier.labels) if node.modifier is not None else set()
    if isinstance(node, promql_parser.VectorSelector):
        return known.get(node.name, set()) | ADDED
    if isinstance(node, promql_parser.BinaryExpr):
        return labels_of(node.lhs, known)
    inner = getattr(node, "vector_selector", None) or getattr(node, "expr", None)
    parts = [inner] if inner is not None else list(getattr(node, "args", None) or ())
    return set().union(*(labels_of(part, known) for part in parts))


def test_expressions_name_metrics_and_labels_that_the_server_emits(
    dashboard: Any, groups: Any, emitted: Labels
) -> None:
    found = list(expressions(dashboard, groups))
    assert len(found) > 50
    assert [wrong for expression in found for wrong in wrong_in(expression, emitted)] == []


@pytest.mark.parametrize(
    ("text", "legend", "wrong"),
    [
        ("rate(vllm:no_such_total[5m])", "", "x: no metric vllm:no_such_total"),
        ('up{tenant="a"}', "", "x: up has no label tenant"),
        ("sum by (tenant) (impart_sequences)", "", "x: nothing to sum by tenant"),
        (
            "sum by (phase) (impart_sequences)",
            "model_name",
            "x: the result has no label model_name",
        ),
    ],
)
def test_wrong_in_finds_what_is_not_emitted(
    text: str, legend: str, wrong: str, emitted: Labels
) -> None:
    expression = Expression("x", text, frozenset({legend} - {""}))
    assert list(wrong_in(expression, emitted)) == [wrong]


def test_tenants_metrics_are_all_on_the_dashboard(dashboard: Any, emitted: Labels) -> None:
    shown = json.dumps(dashboard)
    names = {
        re.sub("_(bucket|count|sum)$", "", n) for n in emitted if n.startswith("impart_tenant_")
    }
    assert names
    assert {name for name in names if name not in shown} == set()


def test_dashboard_has_the_shape_that_grafana_reads(dashboard: Any) -> None:
    assert dashboard["schemaVersion"] >= 36
    assert {"title", "uid", "templating", "time"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert [p["title"] for p in panels if p["type"] == "row"][:3] == [
        "Server",
        "Variants",
        "Tenants",
    ]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= GRID_WIDTH
        taken.update((at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"]))
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"], panel["title"]
            ids = [target["refId"] for target in panel["targets"]]
            assert len(set(ids)) == len(ids)
    assert max(taken.values()) == 1, "two panels overlap"


def test_dashboard_uses_variables_that_it_defines(dashboard: Any, emitted: Labels) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?:{(\w+)}|(\w+))", json.dumps(dashboard["panels"])))
    assert {a or b for a, b in used} - {"__rate_interval"} == set(variables)
    for name in set(variables) - {"datasource"}:
        query = variables[name]["query"]["query"]
        metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in emitted[metric] | ADDED, query


def test_alerts_say_what_is_wrong_and_what_to_do(groups: Any) -> None:
    rules = [rule for group in groups for rule in group["rules"]]
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) >= 10
    settings = {name.replace("_", "-") for name in Settings.__dataclass_fields__}
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in SEVERITIES
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert all(text.endswith(".") for text in rule["annotations"].values()), rule["alert"]
        flags = re.findall(r"--([a-z-]+)", rule["annotations"]["runbook"])
        assert set(flags) <= settings, rule["alert"]


def test_prometheus_evaluates_the_alerts_over_the_job_that_they_name(groups: Any) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert [DEPLOY / "prometheus" / name for name in config["rule_files"]] == [
        DEPLOY / "prometheus" / "alerts.yml"
    ]
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    named = re.findall(r'job="([^"]+)"', json.dumps(groups).replace("\\", ""))
    assert set(named) == jobs

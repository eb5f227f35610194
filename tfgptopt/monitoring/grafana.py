"""A dashboard for Grafana, alerts and a configuration for Prometheus, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tfgptopt.file.replacing import replacing

# Title, unit, and queries with what their lines are called.
_Panel = tuple[str, str, dict[str, str]]


def _quantiles(name: str, window: str = "5m") -> dict[str, str]:
    """Returns queries for percentiles of a histogram."""
    rate = f"sum by (le) (rate({name}_bucket[{window}]))"
    return {f"p{q}": f"histogram_quantile(0.{q}, {rate})" for q in (50, 95, 99)}


_TRAINING: list[_Panel] = [
    ("Loss", "none", {"{{run}}": "tfgptopt_train_loss"}),
    ("Tokens per second", "none", {"{{run}}": "tfgptopt_train_tokens_per_second"}),
    ("Step time", "s", _quantiles("tfgptopt_train_step_seconds")),
    ("Share of time waiting for data", "percentunit",
     {"{{run}}": "rate(tfgptopt_train_data_wait_seconds_total[5m])"}),
    ("Learning rate", "none", {"{{run}}": "tfgptopt_train_learning_rate"}),
    ("Gradient norm", "none", {"{{run}}": "tfgptopt_train_gradient_norm"}),
    ("Steps that were not finite", "none",
     {"{{run}}": "increase(tfgptopt_train_nonfinite_steps_total[5m])"}),
    ("Memory", "bytes", {"{{run}}": "tfgptopt_train_memory_bytes"}),
    ("Sparsity", "percentunit", {"{{group}}": "tfgptopt_sparsity_ratio"}),
    ("Rounding noise", "percentunit", {"{{group}}": "tfgptopt_rounding_noise_ratio"}),
    ("Perplexity of the probe", "none", {"{{run}}": "tfgptopt_probe_perplexity"}),
]  # fmt: skip
_GENERATION: list[_Panel] = [
    ("Requests", "reqps", {"{{route}} {{status}}":
     "sum by (route, status) (rate(tfgptopt_requests_total[5m]))"}),
    ("Tokens", "none", {"{{kind}} per second": "sum by (kind) (rate(tfgptopt_tokens_total[5m]))"}),
    ("Time to first token", "s", _quantiles("tfgptopt_time_to_first_token_seconds")),
    ("Between tokens", "s", _quantiles("tfgptopt_inter_token_seconds")),
    ("Texts", "none", {"running": "sum(tfgptopt_running_texts)",
                       "waiting": "sum(tfgptopt_waiting_texts)"}),
]  # fmt: skip

_ALERTS = {
    "TrainingNotFinite": (
        "increase(tfgptopt_train_nonfinite_steps_total[5m]) > 0", "0m",
        "Gradients of {{ $labels.run }} were NaN or infinite."),
    "TrainingStalled": (
        "tfgptopt_train_running == 1 and increase(tfgptopt_train_steps_total[10m]) == 0", "5m",
        "{{ $labels.run }} makes no steps."),
    "TrainingWaitsForData": (
        "rate(tfgptopt_train_data_wait_seconds_total[10m]) > 0.3", "10m",
        "{{ $labels.run }} waits for data for {{ $value | humanizePercentage }} of the time."),
    "QualityDrifts": (
        "tfgptopt_probe_perplexity > 1.1 * min_over_time(tfgptopt_probe_perplexity[1d])", "0m",
        "The probe's perplexity of {{ $labels.run }} is a tenth above its best of a day."),
    "RequestsFail": (
        'sum(rate(tfgptopt_requests_total{status=~"5.."}[5m])) '
        "> 0.01 * sum(rate(tfgptopt_requests_total[5m]))", "5m",
        "More than 1 % of the requests fail."),
    "RequestsAreRefused": (
        'sum(rate(tfgptopt_requests_total{status="429"}[5m])) '
        "> 0.05 * sum(rate(tfgptopt_requests_total[5m]))", "5m",
        "More than 5 % of the requests find the queue full."),
    "FirstTokenIsLate": (
        f"{_quantiles('tfgptopt_time_to_first_token_seconds')['p95']} > 2", "5m",
        "One first token in 20 takes more than 2 s."),
    "TokensAreSlow": (
        f"{_quantiles('tfgptopt_inter_token_seconds')['p95']} > 0.2", "5m",
        "One token in 20 takes more than 0.2 s."),
}  # fmt: skip


def queries() -> list[str]:
    """Returns all queries of the dashboard and the alerts."""
    found = [q for _, _, lines in _TRAINING + _GENERATION for q in lines.values()]
    return found + [query for query, _, _ in _ALERTS.values()]


def _panels(panels: list[_Panel], row: str, top: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"type": "row", "title": row, "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}}
    ]
    for i, (title, unit, lines) in enumerate(panels):
        place = {"h": 8, "w": 8, "x": 8 * (i % 3), "y": top + 1 + 8 * (i // 3)}
        targets = [
            {"expr": query, "legendFormat": legend, "refId": chr(ord("A") + j)}
            for j, (legend, query) in enumerate(lines.items())
        ]
        made.append(
            {
                "type": "timeseries",
                "title": title,
                "gridPos": place,
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "targets": targets,
            }
        )
    return made


def dashboard() -> dict[str, Any]:
    """Returns the dashboard as Grafana imports it."""
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    panels = _panels(_TRAINING, "Training", 0) + _panels(_GENERATION, "Generation", 40)
    return {
        "title": "tfgptopt",
        "uid": "tfgptopt",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [{"id": i + 1, **panel} for i, panel in enumerate(panels)],
    }


def alerts() -> dict[str, Any]:
    """Returns alert rules as Prometheus reads them."""
    rules = [
        {"alert": name, "expr": query, "for": wait, "annotations": {"summary": text}}
        for name, (query, wait, text) in _ALERTS.items()
    ]
    return {"groups": [{"name": "tfgptopt", "rules": rules}]}


def write_dashboards(folder: str | Path, targets: list[str] | None = None) -> list[Path]:
    """Writes `dashboard.json` for Grafana, and `alerts.yml` and `prometheus.yml` for Prometheus.

    Args:
        folder: Where to. Files of these names are replaced.
        targets: What Prometheus asks, such as `["127.0.0.1:9464", "127.0.0.1:8000"]`. Defaults to
            `None`: these two, a training and a server on this machine.

    Returns:
        The paths.

    Example:

    ```python
    from tfgptopt.monitoring import write_dashboards

    write_dashboards("monitoring")  # prometheus --config.file=monitoring/prometheus.yml
    ```
    """
    asked = [{"targets": targets or ["127.0.0.1:9464", "127.0.0.1:8000"]}]
    configuration = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "tfgptopt", "static_configs": asked}],
    }
    contents = {
        "dashboard.json": json.dumps(dashboard(), indent=1),
        "alerts.yml": yaml.safe_dump(alerts(), sort_keys=False),
        "prometheus.yml": yaml.safe_dump(configuration, sort_keys=False),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        with replacing(Path(folder) / name) as temporary:
            temporary.write_text(text, "utf-8")
    return [Path(folder) / name for name in contents]

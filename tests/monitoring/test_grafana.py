"""The dashboard and the alerts ask for what is exported, and Prometheus understands them."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import prometheus_client
import pytest
import yaml

from tfgptopt.cli.main import run_command
from tfgptopt.monitoring import write_dashboards
from tfgptopt.monitoring.generation import GenerationMetrics
from tfgptopt.monitoring.grafana import dashboard, queries
from tfgptopt.monitoring.training import Prometheus

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus (the Debian package) is not installed."
)


@pytest.fixture
def training():
    sink = Prometheus("mine", 0)
    yield sink
    sink.close()


def numbers(drifted):
    return {
        "loss": 2.0,
        "tokens": 100,
        "nonfinite_steps": 1,
        "gradient_norm": 1.0,
        "learning_rate": 0.1,
        "memory_bytes": 1e9,
        "tokens_per_second": 50.0,
        "sparsity": {"kernel": 0.5},
        "rounding_noise": {"kernel": 0.01},
        "probe_perplexity": 9.0 + 3 * drifted,
    }


def test_queries_ask_for_what_is_exported(training):
    known = {
        sample.name
        for registry in (training.registry, GenerationMetrics().registry)
        for family in registry.collect()
        for sample in family.samples
    } | {"tfgptopt_train_steps_total"}
    # Metrics by labels have no samples before they are used.
    for registry in (training.registry, GenerationMetrics().registry):
        for family in registry.collect():
            known |= {family.name, f"{family.name}_total", f"{family.name}_bucket"}
    for query in queries():
        asked = set(re.findall(r"tfgptopt_\w+", query))
        assert asked and asked <= known, asked - known


def test_files_are_written_and_hold_what_was_asked_for(tmp_path, capsys):
    assert run_command(["monitoring", str(tmp_path / "out"), "--target", "10.0.0.1:9"]) == 0
    assert "prometheus --config.file" in capsys.readouterr().out
    board = json.loads((tmp_path / "out/dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    assert len(panels) == 16 and len({panel["id"] for panel in board["panels"]}) == 18
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert board == dashboard()
    asked = yaml.safe_load((tmp_path / "out/prometheus.yml").read_text())
    assert asked["scrape_configs"][0]["static_configs"] == [{"targets": ["10.0.0.1:9"]}]


def get(port, route, **values):
    address = f"http://127.0.0.1:{port}/api/v1/{route}?{urllib.parse.urlencode(values)}"
    with urllib.request.urlopen(address, timeout=10) as response:
        return json.load(response)


@needs_prometheus
def test_a_real_prometheus_answers_every_query_and_fires(training, tmp_path):
    metrics = GenerationMetrics()
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", metrics.registry)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    targets = [f"127.0.0.1:{training.port}", f"127.0.0.1:{server.server_port}"]
    write_dashboards(tmp_path, targets)
    path = tmp_path / "prometheus.yml"
    path.write_text(path.read_text().replace("5s", "200ms"))
    subprocess.run(["promtool", "check", "config", str(path)], check=True, capture_output=True)
    process = subprocess.Popen(
        ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        firing, seen = set(), False
        expected = {"QualityDrifts", "TrainingNotFinite", "FirstTokenIsLate", "RequestsFail",
                    "RequestsAreRefused", "TokensAreSlow"}  # fmt: skip
        for step in range(300):
            training.step(0.1, 1, 0.05)
            training.report(step, numbers(drifted=seen))
            for status in ("200", "500", "429"):
                metrics.requests.labels("chat", status).inc()
            metrics.new_tokens.inc(5)
            metrics.first_token.observe(3.0)
            metrics.inter_token.observe(0.3)
            time.sleep(0.2)
            if step % 5 == 0:
                try:  # It takes a while to begin.
                    answer = get(port, "query", query="tfgptopt_probe_perplexity")
                    found = get(port, "alerts")["data"]["alerts"]
                except urllib.error.URLError:
                    continue
                seen = seen or bool(answer["data"]["result"])
                firing = {alert["labels"]["alertname"] for alert in found}
                if expected <= firing:
                    break
        assert expected <= firing
        for query in queries():
            answer = get(port, "query", query=query)
            assert answer["status"] == "success", answer
            if not re.search(r" [<>=]+ ", query):
                assert answer["data"]["result"], query
    finally:
        process.terminate()
        process.wait()
        server.shutdown()
        thread.join()

"""Metrics of training and generation: for Prometheus, TensorBoard, JSON lines and Grafana.

`tfgptopt.callbacks.PerformanceMonitor` fills those of training, `tfgptopt serve` those of
generation. Prometheus needs the extra `monitoring`.
"""

from tfgptopt.monitoring.grafana import write_dashboards

__all__ = ["write_dashboards"]

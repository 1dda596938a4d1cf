"""System metrics: this machine's CPU, memory, disk, network and GPU while a run is written from it."""

from collections.abc import Callable, Mapping

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.tracking.mirror import SYSTEM


class SystemMetrics(SystemMetricsMonitor):
    """MLflow's sampling, sent the way of all metrics: MLflow's own thread ends for good when the store is away once.

    `log(values, step)` takes each sample; `first_step`: of the first one.
    """

    def __init__(
        self, run_id: str, tracking_uri: str, log: Callable[[Mapping[str, float], int], None], first_step: int
    ):
        super().__init__(run_id, tracking_uri=tracking_uri)
        self._log, self._step = log, first_step

    def monitor(self) -> None:
        self.collect_metrics()  # rates of network and disk are differences from here on
        while not self._shutdown_event.wait(self.sampling_interval):
            self.collect_metrics()
            prefix = SYSTEM + (f"{self.node_id}/" if self.node_id else "")
            self._log({prefix + name: value for name, value in self.aggregate_metrics().items()}, self._step)
            self._step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

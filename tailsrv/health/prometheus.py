"""Renders findings in the Prometheus text format (`tailsrv-health --format prometheus`). Pure.

The format is https://prometheus.io/docs/instrumenting/exposition_formats/. The names and units of
the metrics follow https://prometheus.io/docs/practices/naming/: base units, and counters end in
`_total`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tailsrv.health.report import ClientHealth, Finding, HealthReport, OrphanReport, Process, ready
from tailsrv.status_schema import ServerState

# The state of a server whose supervisor has died and whose workers serve on.
ORPHANED = "orphaned"
STATES = (*ServerState, ORPHANED)

Labels = Mapping[str, str]
# Name of a family in FAMILIES, labels, and value. A sample whose value is None is left out.
Sample = tuple[str, Labels, float | None]

# By the name of the family, its type and its help text.
FAMILIES = {
    "tailsrv_servers": ("gauge", "Number of servers that were checked."),
    "tailsrv_health_status": (
        "gauge",
        "Health of the server: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.",
    ),
    "tailsrv_info": ("gauge", "Always 1. The labels are the version and the path of the file."),
    "tailsrv_state": ("gauge", "1 for the state that the server is in, 0 for the others."),
    "tailsrv_start_time_seconds": (
        "gauge",
        "Unix time at which the server started. An upgrade does not change it.",
    ),
    "tailsrv_file_size_bytes": ("gauge", "Size of the file of the active segment in bytes."),
    "tailsrv_file_gone": ("gauge", "1 if the path no longer names the served file."),
    "tailsrv_file_unusable": ("gauge", "1 if the next file with this path cannot be opened."),
    "tailsrv_file_missing_seconds": (
        "gauge",
        "Seconds for which no next file with this path has been found (--follow-name).",
    ),
    "tailsrv_log_start_bytes": ("gauge", "The earliest log offset for a new stream, in bytes."),
    "tailsrv_log_end_bytes": ("gauge", "The log offset of the end of the log, in bytes."),
    "tailsrv_log_size_bytes": ("gauge", "Number of bytes in all open segments of the log."),
    "tailsrv_log_segments": ("gauge", "Number of open segments of the log."),
    "tailsrv_log_segments_retired": (
        "gauge",
        "Number of segments that were deleted and are open because clients still read them.",
    ),
    "tailsrv_log_retired_bytes": ("gauge", "Number of bytes in these retired segments."),
    "tailsrv_clients": ("gauge", "Number of connected clients."),
    "tailsrv_clients_unprotected": (
        "gauge",
        "Number of clients that would be disconnected if their worker died.",
    ),
    "tailsrv_clients_max": ("gauge", "Limit of the number of clients, +Inf if there is none."),
    "tailsrv_workers": ("gauge", "Number of workers that are configured."),
    "tailsrv_workers_ready": ("gauge", "Number of workers that are ready."),
    "tailsrv_worker_ready": ("gauge", "1 if the slot has a worker that is ready."),
    "tailsrv_worker_stopped": ("gauge", "1 if a signal has stopped the worker."),
    "tailsrv_worker_silent_seconds": (
        "gauge",
        "Seconds for which the worker has not answered a ping of the supervisor.",
    ),
    "tailsrv_worker_clients": ("gauge", "Number of clients of the slot."),
    "tailsrv_worker_clients_unprotected": (
        "gauge",
        "Number of clients of the slot that would be disconnected if its worker died.",
    ),
    "tailsrv_worker_restarts_total": (
        "counter",
        "Number of workers of the slot that died and were replaced.",
    ),
    "tailsrv_process_uptime_seconds": ("gauge", "Seconds since the process started."),
    "tailsrv_process_cpu_seconds_total": (
        "counter",
        "CPU time that the process has used, in seconds.",
    ),
    "tailsrv_process_pss_bytes": (
        "gauge",
        "Memory of the process in bytes. Processes that share a page count equal parts of it.",
    ),
    "tailsrv_process_open_fds": ("gauge", "Number of open descriptors of the process."),
    "tailsrv_process_max_fds": ("gauge", "Soft limit of the number of open descriptors."),
    "tailsrv_listener_queued": ("gauge", "Number of connections that wait to be accepted."),
    "tailsrv_listener_backlog": ("gauge", "Number of connections that may wait to be accepted."),
    "tailsrv_client_start_bytes": (
        "gauge",
        "Log offset in bytes at which the stream of the client started.",
    ),
    "tailsrv_client_position_bytes": ("gauge", "Log offset in bytes that the client has reached."),
    "tailsrv_client_lag_bytes": (
        "gauge",
        "Bytes between the position of the client and the end of the log.",
    ),
}


def render_metrics(findings: Sequence[Finding]) -> str:
    """Return the findings as metrics, each family with its HELP and TYPE.

    Figures that are not known are left out. If several samples have the same name and labels, only
    the first is kept, because Prometheus would reject the whole scrape. Only the answer of an
    impostor can contain such samples.
    """
    samples: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}
    samples["tailsrv_servers"][""] = len(findings)
    for name, labels, value in (sample for finding in findings for sample in _measure(finding)):
        if value is not None:
            samples[name].setdefault(_labels(labels), value)
    lines = []
    for name, (kind, text) in FAMILIES.items():
        if values := samples[name]:
            lines += [
                f"# HELP {name} {text}",
                f"# TYPE {name} {kind}",
                *(f"{name}{labels} {_value(values[labels])}" for labels in values),
            ]
    return "\n".join(lines) + "\n"


def _measure(finding: Finding) -> Iterator[Sample]:
    server = {"server": ",".join(finding.server.endpoints)}
    yield "tailsrv_health_status", server, finding.verdict.level
    report = finding.report
    if report is not None:
        yield from _measure_server(server, report)
        yield from _measure_workers(server, report)
        yield from _measure_listeners(server, report)
        yield from _measure_clients(server, report.clients or ())
    if finding.orphan_report is not None:
        yield from _measure_orphans(server, finding.orphan_report)


def _measure_server(server: Labels, report: HealthReport) -> Iterator[Sample]:
    yield "tailsrv_info", {**server, "version": report.version, "path": report.file.path}, 1
    yield from _measure_state(server, report.state)
    yield "tailsrv_start_time_seconds", server, report.started
    yield "tailsrv_file_size_bytes", server, report.file.size
    yield "tailsrv_file_gone", server, report.file.gone
    yield "tailsrv_file_unusable", server, report.file.error is not None
    yield "tailsrv_file_missing_seconds", server, report.file.missing
    if (log := report.log) is not None:
        yield "tailsrv_log_start_bytes", server, log.start
        yield "tailsrv_log_end_bytes", server, log.end
        yield "tailsrv_log_size_bytes", server, log.size
        yield "tailsrv_log_segments", server, log.segments
        yield "tailsrv_log_segments_retired", server, log.retired
        yield "tailsrv_log_retired_bytes", server, log.retired_size
    yield "tailsrv_clients", server, report.totals.clients
    yield "tailsrv_clients_unprotected", server, report.totals.unprotected
    yield "tailsrv_clients_max", server, report.totals.max_clients or float("inf")
    yield "tailsrv_workers", server, len(report.workers)
    yield "tailsrv_workers_ready", server, ready(report)
    yield from _measure_process({**server, "process": "supervisor"}, report.supervisor)


def _measure_state(server: Labels, current: str) -> Iterator[Sample]:
    for state in dict.fromkeys([*STATES, current]):
        yield "tailsrv_state", {**server, "state": state}, state == current


def _measure_orphans(server: Labels, report: OrphanReport) -> Iterator[Sample]:
    if report.version is not None and report.path is not None:
        yield "tailsrv_info", {**server, "version": report.version, "path": report.path}, 1
    yield from _measure_state(server, ORPHANED)
    yield "tailsrv_clients", server, report.clients
    for worker in report.workers:
        if worker.slot is None:
            continue
        yield "tailsrv_worker_clients", {**server, "slot": str(worker.slot)}, worker.clients
        if worker.process is not None:
            yield from _measure_process(
                {**server, "process": f"worker {worker.slot}"}, worker.process
            )


def _measure_workers(server: Labels, report: HealthReport) -> Iterator[Sample]:
    for worker in report.workers:
        slot = {**server, "slot": str(worker.slot)}
        yield "tailsrv_worker_ready", slot, worker.alive and worker.ready
        yield "tailsrv_worker_stopped", slot, worker.stopped
        yield "tailsrv_worker_silent_seconds", slot, worker.silent
        yield "tailsrv_worker_clients", slot, worker.clients
        yield "tailsrv_worker_clients_unprotected", slot, worker.unprotected
        yield "tailsrv_worker_restarts_total", slot, worker.restarts
        if worker.process is not None:
            yield from _measure_process(
                {**server, "process": f"worker {worker.slot}"}, worker.process
            )


def _measure_process(labels: Labels, process: Process) -> Iterator[Sample]:
    yield "tailsrv_process_uptime_seconds", labels, process.uptime
    yield "tailsrv_process_cpu_seconds_total", labels, process.cpu_seconds
    yield "tailsrv_process_pss_bytes", labels, process.pss
    yield "tailsrv_process_open_fds", labels, process.descriptors
    yield "tailsrv_process_max_fds", labels, process.descriptor_limit


def _measure_listeners(server: Labels, report: HealthReport) -> Iterator[Sample]:
    for listener in report.listeners:
        labels = {
            **server,
            "endpoint": listener.endpoint,
            "slot": "" if listener.slot is None else str(listener.slot),
        }
        yield "tailsrv_listener_queued", labels, listener.queued
        yield "tailsrv_listener_backlog", labels, listener.backlog


def _measure_clients(server: Labels, clients: Iterable[ClientHealth]) -> Iterator[Sample]:
    """Yield the samples of all clients whose peer address is known.

    If several clients have the same address, only the one with the largest lag is included.
    """
    peers = {
        client.peer: client
        for client in sorted(clients, key=lambda client: client.lag or 0)
        if client.peer is not None
    }
    for peer, client in peers.items():
        labels = {**server, "peer": peer, "slot": str(client.slot)}
        yield "tailsrv_client_start_bytes", labels, client.start
        yield "tailsrv_client_position_bytes", labels, client.position
        yield "tailsrv_client_lag_bytes", labels, client.lag


def _labels(labels: Labels) -> str:
    return (
        "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"
        if labels
        else ""
    )


def _escape(text: str) -> str:
    """Return `text` escaped as a label value. Bytes of a path that are not UTF-8 become escapes."""
    decodable = text.encode(errors="backslashreplace").decode()
    return decodable.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _value(value: float) -> str:
    return str(int(value)) if isinstance(value, int) else repr(value).replace("inf", "+Inf")

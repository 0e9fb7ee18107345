"""Finds tailsrv servers, inspects them and judges their health: the library of `tailsrv-health`.

Example:
    from tailsrv.health import find, inspect, judge

    for server in find(port=4321):
        report = inspect(server)
        print(judge(report).level.name, report.totals.clients)

"""

from tailsrv.health.control_client import (
    EndedError,
    InspectError,
    NoSupervisorError,
    NotOursError,
    find,
)
from tailsrv.health.inspection import inspect
from tailsrv.health.report import ClientHealth as Client
from tailsrv.health.report import HealthReport as Report
from tailsrv.health.report import HealthVerdict as Verdict
from tailsrv.health.report import Level, OrphanReport, Process, Server, Totals, judge
from tailsrv.health.report import OrphanHealth as Orphan
from tailsrv.health.report import WorkerHealth as Worker
from tailsrv.status_schema import FileStatus as ServedFile
from tailsrv.status_schema import ListenerStatus as Listener
from tailsrv.status_schema import LogStatus as Log
from tailsrv.status_schema import SegmentStatus as Segment

__all__ = [
    "Client",
    "EndedError",
    "InspectError",
    "Level",
    "Listener",
    "Log",
    "NoSupervisorError",
    "NotOursError",
    "Orphan",
    "OrphanReport",
    "Process",
    "Report",
    "Segment",
    "ServedFile",
    "Server",
    "Totals",
    "Verdict",
    "Worker",
    "find",
    "inspect",
    "judge",
]

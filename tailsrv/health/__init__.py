"""Finds tailsrv's servers, looks at them, and says whether they are well: the library behind the command `tailsrv-health`.

from tailsrv.health import find, inspect, judge

for server in find(port=4321):
    report = inspect(server)
    print(judge(report).level.name, report.totals.clients)
"""

from tailsrv.health.control_client import EndedError, InspectError, NotOursError, find
from tailsrv.health.inspection import inspect
from tailsrv.health.report import Level, Process, Report, Server, Totals, Verdict, Worker, judge
from tailsrv.status_schema import Client, Listener, ServedFile

__all__ = [
    "Client", "EndedError", "InspectError", "Level", "Listener", "NotOursError", "Process", "Report", "ServedFile", "Server",
    "Totals", "Verdict", "Worker", "find", "inspect", "judge",
]  # fmt: skip

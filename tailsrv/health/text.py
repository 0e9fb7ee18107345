"""Renders findings as text: one line for alerts, then tables of at most 100 columns. Pure."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from tailsrv.formatting import counted, size
from tailsrv.health.report import (
    WORKING,
    ClientHealth,
    Finding,
    HealthReport,
    Level,
    OrphanHealth,
    OrphanReport,
    Process,
    WorkerHealth,
    ready,
    worst,
)
from tailsrv.status_schema import (
    FileStatus,
    ListenerStatus,
    LogStatus,
    SegmentStatus,
    ServerState,
)

WIDTH = 100
# The path in the summary gets at least this many columns, however long the rest is.
MIN_PATH = 20

_BOLD, _RED = "1", "31"
_COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.CRITICAL: _RED, Level.UNKNOWN: "35"}

Row = tuple[str, ...]


def render_text(findings: Sequence[Finding], level: Level, summary: str, colour: bool) -> str:
    """Return the text for `findings`. Its first line is `level` and `summary`."""
    lines = [f"{_paint_level(level, colour)}: {summary}"]
    for finding in findings:
        if len(findings) > 1:
            lines += ["", f"{_paint_level(finding.verdict.level, colour)}: {describe(finding)}"]
        if finding.report:
            lines += _render_report(finding.report, colour)
        if finding.orphan_report:
            lines += _render_orphans(finding.orphan_report, colour)
    return "\n".join(lines) + "\n"


def summarize(findings: Sequence[Finding], none_found: str) -> tuple[Level, str]:
    """Return the worst level of all findings, and a summary on one line.

    `none_found` is the summary if there are no findings, which is CRITICAL.
    """
    level = worst(finding.verdict.level for finding in findings)
    bad = [finding for finding in findings if finding.verdict.level is not Level.OK]
    match len(findings), len(bad):
        case 0, _:
            return Level.CRITICAL, none_found
        case 1, _:
            return level, describe(findings[0])
        case _, 0:
            clients = sum(finding.report.totals.clients for finding in findings if finding.report)
            return level, f"{len(findings)} tailsrv servers serve {counted(clients, 'client')}"
        case _:
            # The servers that cause the level come first.
            bad.sort(key=lambda finding: finding.verdict.level is not level)
            return level, f"{len(bad)} of {len(findings)} servers: " + "; ".join(
                describe(finding) for finding in bad
            )


def describe(finding: Finding) -> str:
    """Return one line about one server: what it does if it is OK, the reasons otherwise."""
    server, verdict, report = finding.server, finding.verdict, finding.report
    user = f" (user {server.user})" if server.user and not server.ours else ""
    name = f"tailsrv {','.join(server.endpoints)}{user}"
    if report is None or verdict.level is not Level.OK:
        state = (
            f" ({printable(report.state)})"
            if report and report.state != ServerState.SERVING
            else ""
        )
        return f"{name}{state}: {'; '.join(map(printable, verdict.reasons))}"
    before, after = _state_words(report)
    room = WIDTH - len(f"{verdict.level.name}: {name} {before} {after}")
    return f"{name} {before} {_shorten(printable(report.file.path), max(room, MIN_PATH))}{after}"


def _state_words(report: HealthReport) -> tuple[str, str]:
    """Return what a server does, as the words before the path and the words after it."""
    clients, workers = (
        counted(report.totals.clients, "client"),
        counted(len(report.workers), "worker"),
    )
    match report.state:
        case ServerState.SERVING:
            return "serves", f" to {clients} with {workers}"
        case ServerState.STARTING:
            return "starts to serve", f" with {workers}"
        case ServerState.WAITING:
            return "waits for file", ""
        case ServerState.DRAINING:
            return "is draining", f", {clients} left"
        case other:
            return f"is {printable(other)},", f", {clients}"


# Texts and numbers


def printable(text: str) -> str:
    """Return `text` on one line, with control characters escaped: they could affect a terminal."""
    return text if text.isprintable() else ascii(text)


def duration_text(seconds: float | None) -> str:
    """Return a duration in its two largest units, such as `3d 4h`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next((index for index, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number}{unit}" for number, unit in parts[first : first + 2])


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.0f}{unit}"


def _shorten(text: str, room: int) -> str:
    """Return `text`, or its end if it is too long: the end of a path identifies the file best."""
    return text if len(text) <= room else "..." + text[3 - room :]


# Tables


def _render_report(report: HealthReport, colour: bool) -> list[str]:
    lines = ["", *_render_facts(report), "", *_render_processes(report, colour)]
    if report.listeners:
        lines += ["", *_render_listeners(report.listeners, colour)]
    if report.segments:
        lines += ["", *_render_segments(report.segments, colour)]
    if report.clients is not None:
        lines += ["", *_render_clients(report.clients, colour)]
    return lines


def _render_facts(report: HealthReport) -> list[str]:
    file, totals = report.file, report.totals
    about = [printable(file.path), _size_words(file, report.state)]
    about += ["gone from its path"] * file.gone
    if file.missing is not None:
        about += [f"no next file for {duration_text(file.missing)}"]
    clients = [str(totals.clients)]
    clients += [f"{totals.unprotected} unprotected"] * bool(totals.unprotected)
    clients += [f"at most {totals.max_clients}"] * bool(totals.max_clients)
    state = [
        report.state,
        f"{ready(report)} of {counted(len(report.workers), 'worker')}",
        f"version {report.version}",
    ]
    state += [f"user {report.server.user}"] * bool(report.server.user)
    return [
        *_fact("file", about),
        *_fact("log", _log_words(report.log) if report.log else []),
        *_fact("state", [printable(part) for part in state]),
        *_fact("clients", clients),
    ]


def _log_words(log: LogStatus) -> list[str]:
    words = [
        f"offsets {log.start} to {'-' if log.end is None else log.end}",
        f"{counted(log.segments, 'segment')} of {size(log.size)}",
    ]
    if log.retired:
        words += [f"{log.retired} deleted ({size(log.retired_size)})"]
    return words


def _size_words(file: FileStatus, state: str) -> str:
    if file.size is not None:
        return size(file.size)
    if file.error is not None:
        return "cannot be opened"
    return "not there yet" if state == ServerState.WAITING else "cannot be read"


def _fact(name: str, parts: Iterable[str]) -> list[str]:
    """Return a line of the facts above the tables, wrapped to WIDTH columns."""
    text, room = ", ".join(parts), WIDTH - 9
    return [
        f"{'' if start else name:9}{text[start : start + room]}"
        for start in range(0, len(text), room)
    ]


def _render_processes(report: HealthReport, colour: bool) -> list[str]:
    supervisor, totals = report.supervisor, report.totals
    head = ("process", "pid", "state", "uptime", "CPU", "PSS", "descriptors", "clients", "restarts")
    working = report.state in WORKING
    rows = [("supervisor", *_process_cells(supervisor, supervisor.state or "-"), "", "")]
    rows += [
        (
            f"worker {worker.slot}",
            *_process_cells(worker.process, _worker_words(worker, working)),
            str(worker.clients),
            str(worker.restarts),
        )
        for worker in report.workers
    ]
    rows.append(
        (
            *("total", "", "", ""),
            _number(totals.cpu, " %"),
            size(totals.pss),
            _number(totals.descriptors),
            str(totals.clients),
            str(totals.restarts),
        )
    )
    bad = {
        1 + index
        for index, worker in enumerate(report.workers)
        if (working and not worker.alive) or worker.stopped or worker.hung
    }
    return _table(head, rows, left={0, 2}, colour=colour, bad=bad)


def _render_orphans(report: OrphanReport, colour: bool) -> list[str]:
    head = ("process", "pid", "state", "uptime", "CPU", "PSS", "descriptors", "clients")
    rows = [
        (
            f"worker {_number(worker.slot)}",
            *_orphan_cells(worker),
            _number(worker.clients),
        )
        for worker in report.workers
    ]
    file = [] if report.path is None else [printable(report.path)]
    version = [] if report.version is None else [f"version {printable(report.version)}"]
    bad = {index for index, worker in enumerate(report.workers) if worker.clients is None}
    return [
        "",
        *_fact("file", file),
        *_fact("state", ["no supervisor", *version]),
        "",
        *_table(head, rows, left={0, 2}, colour=colour, bad=bad),
    ]


def _orphan_cells(worker: OrphanHealth) -> Row:
    process = worker.process
    if process is None:
        return (str(worker.pid) if worker.pid else "-", *_process_cells(None, "-")[1:])
    return _process_cells(process, process.state or "-")


def _process_cells(process: Process | None, state: str) -> Row:
    if process is None:
        return ("-", state, "-", "-", "-", "-")
    descriptors = _number(process.descriptors)
    if process.descriptor_limit is not None:
        descriptors += f"/{process.descriptor_limit}"
    return (
        str(process.pid),
        state,
        duration_text(process.uptime),
        _number(process.cpu, " %"),
        size(process.pss),
        descriptors,
    )


def _worker_words(worker: WorkerHealth, working: bool) -> str:
    if worker.process is None:
        return "missing" if working else "not started"
    if worker.hung:
        return f"hangs {duration_text(worker.silent).partition(' ')[0]}"
    if not worker.ready and not worker.stopped:
        return "not ready"
    return worker.process.state or "-"


def _render_listeners(listeners: Iterable[ListenerStatus], colour: bool) -> list[str]:
    """Return a table with one row for each endpoint, which shows its fullest queue.

    A row for each queue would be harder to read, for example with 64 workers.
    """
    rows = []
    for endpoint, group in groupby(
        sorted(listeners, key=lambda listener: listener.endpoint),
        key=lambda listener: listener.endpoint,
    ):
        queues = list(group)
        fullest = max(queues, key=_fill)
        slot = "shared" if fullest.slot is None else f"slot {fullest.slot}"
        share = f"{fullest.queued} of {fullest.backlog} ({100 * _fill(fullest):.0f} %), {slot}"
        rows.append(
            (
                printable(endpoint),
                str(len(queues)),
                str(sum(queue.queued for queue in queues)),
                share,
            )
        )
    return _table(
        ("listener", "queues", "waiting", "fullest queue"), rows, left={0, 3}, colour=colour
    )


def _fill(listener: ListenerStatus) -> float:
    return listener.queued / listener.backlog if listener.backlog else 0.0


def _render_segments(segments: Iterable[SegmentStatus], colour: bool) -> list[str]:
    """Return a table with one row for each segment, in the order of the log."""
    head = ("segment at", "size", "state", "clients", "path")
    rows = [
        (
            str(segment.base),
            size(segment.size),
            _segment_words(segment),
            str(segment.clients),
            printable(segment.path or "-"),
        )
        for segment in segments
    ]
    # The path is the last column: it gets the columns that the others leave.
    widths = [max(map(len, column)) + 2 for column in zip(head, *rows, strict=True)]
    room = max(WIDTH - sum(widths[:-1]), MIN_PATH)
    rows = [(*row[:-1], _shorten(row[-1], room)) for row in rows]
    return _table(head, rows, left={2, 4}, colour=colour)


def _segment_words(segment: SegmentStatus) -> str:
    state = "sealed" if segment.sealed else "active"
    return f"{state}, deleted" if segment.deleted else state


def _render_clients(clients: Iterable[ClientHealth], colour: bool) -> list[str]:
    """Return a table with one row for each client.

    The client with the largest lag comes first. Clients whose lag is unknown come last.
    """
    rows = []
    for client in sorted(
        clients, key=lambda client: -1 if client.lag is None else client.lag, reverse=True
    ):
        offsets = (_number(client.start), _number(client.position), _number(client.lag))
        rows.append(
            (
                printable(client.peer or "-"),
                str(client.slot),
                *offsets,
                "beyond the end" if client.beyond else size(client.lag),
            )
        )
    return _table(
        ("client", "slot", "start", "position", "lag in bytes", "lag"),
        rows,
        left={0},
        colour=colour,
    )


def _table(
    head: Row, rows: Sequence[Row], left: set[int], colour: bool, bad: Iterable[int] = ()
) -> list[str]:
    """Return the lines of a table.

    `left` are the indexes of the left-aligned columns, `bad` those of the rows in red.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    alert = set(bad)

    def line(row: Row) -> str:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    lines = [_paint(line(row), _RED, colour and index in alert) for index, row in enumerate(rows)]
    return [_paint(line(head), _BOLD, colour), *lines]


def _paint_level(level: Level, colour: bool) -> str:
    return _paint(level.name, _COLOURS[level], colour)


def _paint(text: str, code: str, colour: bool) -> str:
    # SGR sequences of ECMA-48.
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text

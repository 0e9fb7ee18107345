"""What `tailsrv-health` decides and prints, tested on tables without a server."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tailsrv.formatting import size
from tailsrv.health import EndedError, InspectError, NoSupervisorError, NotOursError
from tailsrv.health.main import doubtful_servers, examine, in_turns, to_finding
from tailsrv.health.prometheus import render_metrics
from tailsrv.health.report import (
    ClientHealth,
    Finding,
    HealthReport,
    HealthVerdict,
    Level,
    OrphanHealth,
    OrphanReport,
    Process,
    Server,
    Totals,
    WorkerHealth,
    describe_orphans,
    judge,
    total,
    worst,
)
from tailsrv.health.text import WIDTH, duration_text, render_text, summarize
from tailsrv.status_schema import (
    ClientStatus,
    FileStatus,
    ListenerStatus,
    LogStatus,
    SegmentStatus,
)

SERVER = Server(("*:4321",), 4711, 0, "root", ours=True)
PROCESS = Process(4711, "sleeping", 100.0, 0.0, 1.5, 1 << 20, 20, 1000)
WORKER = WorkerHealth(
    0, PROCESS, ready=True, clients=35, unprotected=0, restarts=0, restarted=None, silent=0.0
)
LISTENER = ListenerStatus(0, "0.0.0.0:4321", 0, 100)
LOG = LogStatus(0, 588895, segments=1, size=588895, retired=0, retired_size=0)
REPORT = HealthReport(
    server=SERVER,
    version="1.0.0",
    state="serving",
    started=1767225600.0,
    file=FileStatus("/var/log/app.log", 588895, gone=False, error=None),
    log=LOG,
    supervisor=PROCESS,
    workers=(WORKER, replace(WORKER, slot=1)),
    listeners=(LISTENER, replace(LISTENER, slot=1)),
    totals=Totals(137, 0, 0, 0, 0, 0.0, 3 << 20, 60),
    segments=None,
    clients=None,
)


def with_worker(**changes: object) -> HealthReport:
    """Return a report whose second worker has these changes."""
    return replace(REPORT, workers=(WORKER, replace(WORKER, slot=1, **changes)))  # type: ignore[arg-type]


def with_process(**changes: object) -> HealthReport:
    """Return a report whose second worker's process has these changes."""
    return with_worker(process=replace(PROCESS, **changes))  # type: ignore[arg-type]


EMPTY = (replace(WORKER, process=None, ready=False),)
FULL = "the accept queue of slot 0 at 0.0.0.0:4321 holds 91 of 100 connections"
GONE = FileStatus("/log", 1, gone=True, error=None)
# Moved away, with --follow-name: the next file exists, or is missing for a time.
ROTATED = replace(GONE, follow_name=True)
MISSING = replace(ROTATED, missing=299.9)
NO_NEXT = "the file is gone, and there has been no next one for 5 minutes"
WITHOUT_SIZE = FileStatus("/log", None, gone=False, error=None)
UNREADABLE = "the file cannot be read: its file system does not answer"


@pytest.mark.parametrize(
    ("report", "level", "reasons"),
    [
        (REPORT, Level.OK, ()),
        (with_worker(process=None), Level.WARNING, ("1 of 2 workers ready",)),
        (with_worker(ready=False), Level.WARNING, ("1 of 2 workers ready",)),
        (with_process(state="zombie"), Level.WARNING, ("1 of 2 workers ready",)),
        (with_process(state="disk-sleep"), Level.OK, ()),
        (with_process(state=None, pss=None, descriptors=None, descriptor_limit=None), Level.OK, ()),
        (with_process(descriptors=900), Level.OK, ()),
        (with_process(descriptors=901), Level.WARNING, ("worker 1 uses 901 of 1000 descriptors",)),
        (with_process(descriptors=901, descriptor_limit=None), Level.OK, ()),
        (
            replace(REPORT, supervisor=replace(PROCESS, descriptors=999)),
            Level.WARNING,
            ("supervisor uses 999 of 1000 descriptors",),
        ),
        (
            with_worker(restarted=59.9),
            Level.WARNING,
            ("worker 1 was restarted in the last minute",),
        ),
        (with_worker(restarted=60.0), Level.OK, ()),
        (replace(REPORT, listeners=(replace(LISTENER, queued=90),)), Level.OK, ()),
        (
            replace(REPORT, listeners=(replace(LISTENER, queued=91),)),
            Level.WARNING,
            (FULL,),
        ),
        (
            replace(REPORT, listeners=(ListenerStatus(None, "[::]:1", 95, 100),)),
            Level.WARNING,
            ("the accept queue at [::]:1 holds 95 of 100 connections",),
        ),
        (replace(REPORT, listeners=(replace(LISTENER, queued=1, backlog=0),)), Level.OK, ()),
        (replace(REPORT, workers=EMPTY), Level.CRITICAL, ("no worker",)),
        (replace(REPORT, workers=EMPTY, state="starting"), Level.CRITICAL, ("no worker",)),
        (replace(REPORT, workers=EMPTY, state="waiting for file"), Level.OK, ()),
        (replace(REPORT, workers=EMPTY, state="draining"), Level.OK, ()),
        (replace(REPORT, file=GONE), Level.CRITICAL, ("the file is gone",)),
        (replace(REPORT, file=replace(GONE, size=None)), Level.CRITICAL, ("the file is gone",)),
        (replace(REPORT, file=ROTATED), Level.OK, ()),
        (replace(REPORT, file=MISSING), Level.OK, ()),
        (replace(REPORT, file=replace(MISSING, missing=300.0)), Level.WARNING, (NO_NEXT,)),
        (
            replace(REPORT, state="starting", file=replace(MISSING, missing=1e9)),
            Level.WARNING,
            (NO_NEXT,),
        ),
        (
            replace(REPORT, state="draining", file=replace(MISSING, missing=1e9)),
            Level.OK,
            (),
        ),
        (replace(REPORT, file=replace(ROTATED, size=None)), Level.CRITICAL, (UNREADABLE,)),
        (
            replace(REPORT, file=replace(ROTATED, error="Permission denied")),
            Level.CRITICAL,
            ("cannot open the file: Permission denied",),
        ),
        (replace(REPORT, file=WITHOUT_SIZE), Level.CRITICAL, (UNREADABLE,)),
        (replace(REPORT, file=WITHOUT_SIZE, state="starting"), Level.CRITICAL, (UNREADABLE,)),
        (replace(REPORT, file=WITHOUT_SIZE, state="waiting for file"), Level.OK, ()),
        (replace(REPORT, file=WITHOUT_SIZE, state="draining"), Level.OK, ()),
        (
            replace(
                REPORT,
                state="waiting for file",
                file=FileStatus("/log", None, gone=False, error="Permission denied"),
            ),
            Level.CRITICAL,
            ("cannot open the file: Permission denied",),
        ),
        (
            replace(
                REPORT, totals=replace(REPORT.totals, max_clients=REPORT.totals.clients, queued=3)
            ),
            Level.WARNING,
            (f"--max-clients is reached ({REPORT.totals.clients}): 3 connections waiting",),
        ),
        (
            replace(
                REPORT, totals=replace(REPORT.totals, max_clients=REPORT.totals.clients, queued=0)
            ),
            Level.OK,
            (),
        ),
        (replace(REPORT, file=GONE, state="draining"), Level.OK, ()),
        (with_process(state="stopped"), Level.CRITICAL, ("worker 1 is stopped",)),
        (
            with_worker(process=replace(PROCESS, state="stopped"), silent=9.0),
            Level.CRITICAL,
            ("worker 1 is stopped",),
        ),
        (with_worker(silent=1.9), Level.OK, ()),
        (with_worker(silent=2.0), Level.CRITICAL, ("worker 1 hangs",)),
        (with_worker(process=None, silent=9.0), Level.WARNING, ("1 of 2 workers ready",)),
        (
            replace(REPORT, state="draining", workers=(replace(WORKER, silent=3.0),)),
            Level.CRITICAL,
            ("worker 0 hangs",),
        ),
        (
            replace(
                REPORT,
                workers=(
                    replace(WORKER, silent=3.0),
                    replace(WORKER, slot=1, silent=3.0, restarted=1.0),
                ),
            ),
            Level.CRITICAL,
            ("workers 0, 1 hang", "worker 1 was restarted in the last minute"),
        ),
    ],
)
def test_judge(report: HealthReport, level: Level, reasons: tuple[str, ...]) -> None:
    """Each fault has its level and its text, and the gravest come first."""
    assert judge(report) == HealthVerdict(level, reasons)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([], Level.OK),
        ([Level.OK, Level.UNKNOWN], Level.UNKNOWN),
        ([Level.UNKNOWN, Level.WARNING, Level.OK], Level.WARNING),
        ([Level.UNKNOWN, Level.CRITICAL, Level.WARNING], Level.CRITICAL),
    ],
)
def test_worst(levels: list[Level], expected: Level) -> None:
    """A known fault is worse than UNKNOWN, and UNKNOWN is worse than OK."""
    assert worst(levels) is expected


ORPHAN = OrphanHealth(4712, 0, 35, 29.9, PROCESS)
SILENT = OrphanHealth(4713, None, None, None, None)
ORPHANS = OrphanReport("1.0.0", "/var/log/app.log", 35, 29.9, (ORPHAN,))


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (ORPHANS, "1 orphaned worker serves 35 clients for another 29 seconds"),
        (
            replace(ORPHANS, workers=(ORPHAN, ORPHAN), clients=1, seconds=1.9),
            "2 orphaned workers serve 1 client for another 1 second",
        ),
        (
            replace(ORPHANS, workers=(ORPHAN, SILENT), clients=0, seconds=0.0),
            "2 orphaned workers serve 0 clients for another 0 seconds, 1 of them does not answer",
        ),
        (
            replace(ORPHANS, workers=(ORPHAN, SILENT, SILENT)),
            "3 orphaned workers serve 35 clients for another 29 seconds, 2 of them do not answer",
        ),
        (OrphanReport(None, None, None, None, (SILENT,)), "1 orphaned worker does not answer"),
        (OrphanReport(None, None, None, None, (SILENT,) * 2), "2 orphaned workers do not answer"),
    ],
)
def test_orphans(report: OrphanReport, sentence: str) -> None:
    """The sentence about orphans has their number, their clients and the time that is left."""
    assert describe_orphans(report) == f"no supervisor, {sentence}"


def test_table_of_orphans() -> None:
    """Each orphan has a row; what is unknown is a dash, and rows of silent ones are coloured."""
    report = replace(ORPHANS, workers=(ORPHAN, SILENT, replace(SILENT, pid=0)))
    finding = to_finding(SERVER, NoSupervisorError(report), asked_for=False)
    assert finding is not None
    lines = render_text([finding], Level.CRITICAL, "", colour=True).splitlines()
    assert "file     /var/log/app.log" in lines
    assert "state    no supervisor, version 1.0.0" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["worker", "0", "4711", "sleeping", "1m", "40s", "0", "%", "1.0", "MiB", "20/1000", "35"],
        ["\x1b[31mworker", "-", "4713", "-", "-", "-", "-", "-", "-\x1b[0m"],
        ["\x1b[31mworker", "-", "-", "-", "-", "-", "-", "-", "-\x1b[0m"],
    ]


def test_metrics_of_orphans_that_do_not_answer() -> None:
    """Without a greeting, only the state of orphans is known."""
    report = OrphanReport(None, None, None, None, (SILENT,))
    finding = to_finding(SERVER, NoSupervisorError(report), asked_for=False)
    assert finding is not None
    lines = render_metrics([finding]).splitlines()
    assert [line for line in lines if not line.startswith("#") and not line.endswith(" 0")] == [
        "tailsrv_servers 1",
        'tailsrv_health_status{server="*:4321"} 2',
        'tailsrv_state{server="*:4321",state="orphaned"} 1',
    ]


UNHEALTHY = replace(REPORT, workers=())


@pytest.mark.parametrize(
    ("outcome", "asked_for", "doubtful", "level"),
    [
        (REPORT, False, False, Level.OK),
        (REPORT, True, True, Level.OK),
        (UNHEALTHY, True, False, Level.CRITICAL),
        (UNHEALTHY, True, True, Level.UNKNOWN),
        (with_worker(restarted=1.0), True, True, Level.UNKNOWN),
        (EndedError("ended", Level.CRITICAL), True, False, None),
        (NotOursError("another user's"), False, False, None),
        (NotOursError("another user's"), True, False, Level.UNKNOWN),
        (InspectError("no answer", Level.CRITICAL), False, False, Level.CRITICAL),
        (InspectError("no answer", Level.CRITICAL), True, False, Level.CRITICAL),
        (InspectError("no answer", Level.CRITICAL), True, True, Level.UNKNOWN),
        (NoSupervisorError(ORPHANS), False, False, Level.CRITICAL),
        (NoSupervisorError(ORPHANS), False, True, Level.UNKNOWN),
    ],
)
def test_finding(
    outcome: HealthReport | InspectError, asked_for: bool, doubtful: bool, level: Level | None
) -> None:
    """Ended servers, and other users' unless asked for, are left out; doubt means UNKNOWN."""
    finding = to_finding(SERVER, outcome, asked_for, doubtful)
    assert (finding.verdict.level if finding else None) == level


@pytest.mark.parametrize(("asked_for", "level"), [(True, Level.CRITICAL), (False, Level.UNKNOWN)])
def test_finding_of_an_unknown_user(asked_for: bool, level: Level) -> None:
    """A full server whose user is unknown is CRITICAL only if it was asked for by port or pid."""
    finding = to_finding(
        replace(SERVER, pid=None, uid=None), InspectError("too many", Level.CRITICAL), asked_for
    )
    assert finding is not None
    assert finding.verdict.level == level


def server_of(uid: int | None, *endpoints: str) -> Server:
    """Return a server that belongs to the user `uid`."""
    return Server(endpoints, 4711, uid, None, ours=False)


@pytest.mark.parametrize(
    ("server", "others", "doubtful"),
    [
        (server_of(7, "evil:1"), [], False),
        (server_of(7, "evil:1"), [server_of(0, "*:1")], True),
        (server_of(7, "evil:1"), [server_of(8, "*:1")], True),
        (server_of(7, "evil:1", "evil:2"), [server_of(0, "127.0.0.1:2", "127.0.0.1:3")], True),
        (server_of(7, "evil:1"), [server_of(0, "*:2")], False),
        (server_of(7, "a:1"), [server_of(7, "b:1")], False),
        (server_of(0, "*:1"), [server_of(7, "evil:1")], False),
        (replace(server_of(7, "*:1"), ours=True), [server_of(8, "evil:1")], False),
        (server_of(None, "*:1"), [], False),
        (server_of(None, "*:1"), [server_of(None, "evil:1")], True),
        (server_of(7, "a:1"), [server_of(None, "b:1")], True),
    ],
)
def test_doubtful_servers(server: Server, others: list[Server], doubtful: bool) -> None:
    """A server is doubtful beside another user's on its port, unless it is ours or root's."""
    assert (server in doubtful_servers([server, *others])) is doubtful


def test_in_turns() -> None:
    """The first server of each user comes before the second server of any user."""
    many, few = (
        [server_of(7, f"{number}:1") for number in range(100)],
        [server_of(8, "x:1"), server_of(None, "y:1")],
    )
    assert in_turns([*many, *few]) == [many[0], *few, *many[1:]]


def test_no_time_left() -> None:
    """A server for which there is no time left is UNKNOWN, with the reason "not asked"."""
    outcome = examine(SERVER, clients=False, until=0.0)
    assert isinstance(outcome, InspectError)
    assert (outcome.level, str(outcome).partition(":")[0]) == (Level.UNKNOWN, "not asked")


def test_total() -> None:
    """A sum is unknown if one of its parts is unknown."""
    assert total([1, 2]) == 3
    assert total([1, None]) is None


def judged(report: HealthReport) -> Finding:
    return Finding(report.server, judge(report), report)


BAD = Finding(
    replace(SERVER, endpoints=("*:1",)),
    HealthVerdict(Level.CRITICAL, ("no worker", "the file is gone")),
)


@pytest.mark.parametrize(
    ("findings", "level", "sentence"),
    [
        (
            [judged(REPORT)],
            Level.OK,
            "tailsrv *:4321 serves /var/log/app.log to 137 clients with 2 workers",
        ),
        (
            [judged(replace(REPORT, state="starting"))],
            Level.OK,
            "tailsrv *:4321 starts to serve /var/log/app.log with 2 workers",
        ),
        (
            [judged(replace(REPORT, state="waiting for file"))],
            Level.OK,
            "tailsrv *:4321 waits for file /var/log/app.log",
        ),
        (
            [judged(replace(REPORT, state="draining"))],
            Level.OK,
            "tailsrv *:4321 is draining /var/log/app.log, 137 clients left",
        ),
        (
            [judged(replace(with_worker(ready=False), state="starting"))],
            Level.WARNING,
            "tailsrv *:4321 (starting): 1 of 2 workers ready",
        ),
        (
            [
                judged(
                    replace(
                        REPORT,
                        server=replace(SERVER, user="nobody", ours=False),
                        state="waiting for file",
                    )
                )
            ],
            Level.OK,
            "tailsrv *:4321 (user nobody) waits for file /var/log/app.log",
        ),
        ([BAD], Level.CRITICAL, "tailsrv *:1: no worker; the file is gone"),
        ([judged(REPORT), judged(REPORT)], Level.OK, "2 tailsrv servers serve 274 clients"),
        (
            [judged(REPORT), judged(with_worker(ready=False)), BAD],
            Level.CRITICAL,
            "2 of 3 servers: tailsrv *:1: no worker; the file is gone; "
            "tailsrv *:4321: 1 of 2 workers ready",
        ),
        ([], Level.CRITICAL, "nothing here"),
    ],
)
def test_summary(findings: list[Finding], level: Level, sentence: str) -> None:
    """One sentence states what is served to how many clients, or the reasons against it."""
    assert summarize(findings, "nothing here") == (level, sentence)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_size(count: int | None, text: str) -> None:
    """A size is shown in the largest unit that is not larger than the size itself."""
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (3661, "1h 1m"),
        (3 * 86400 + 4 * 3600, "3d 4h"),
        (400 * 86400, "400d 0h"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    """A duration is shown by its two largest units."""
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ("waiting for file", None, "not there yet"),
        ("waiting for file", "Permission denied", "cannot be opened"),
        ("serving", None, "cannot be read"),
        ("starting", None, "cannot be read"),
        ("draining", None, "cannot be read"),
    ],
)
def test_size_that_is_not_known(state: str, error: str | None, words: str) -> None:
    """A file without a known size is missing, cannot be opened, or cannot be read."""
    report = replace(REPORT, state=state, file=replace(WITHOUT_SIZE, error=error))
    assert (
        f"file     /log, {words}"
        in render_text([judged(report)], Level.OK, "", colour=False).splitlines()
    )


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (None, []),
        (LOG, ["log      offsets 0 to 588895, 1 segment of 575.1 KiB"]),
        (replace(LOG, end=None, size=None), ["log      offsets 0 to -, 1 segment of -"]),
        (
            LogStatus((1 << 54) + 1, (1 << 54) + 3073, 3, 3073, retired=1, retired_size=1024),
            [
                "log      offsets 18014398509481985 to 18014398509485057, "
                "3 segments of 3.0 KiB, 1 deleted (1.0 KiB)"
            ],
        ),
    ],
)
def test_log(log: LogStatus | None, words: list[str]) -> None:
    """The log is shown with its exact offsets, and with what deleted segments still hold."""
    text = render_text([judged(replace(REPORT, log=log))], Level.OK, "", colour=False)
    assert [line for line in text.splitlines() if line.startswith("log")] == words


def test_missing_file() -> None:
    """The facts tell for how long a server has waited for the next file."""
    text = render_text([judged(replace(REPORT, file=MISSING))], Level.OK, "", colour=False)
    assert "file     /log, 1 B, gone from its path, no next file for 4m 59s" in text.splitlines()


def test_segments() -> None:
    """Each segment has a row in the order of the log; a long path is shortened at its start."""
    segments = (
        SegmentStatus(0, 0, sealed=True, clients=0, path=None, deleted=True),
        SegmentStatus(1 << 60, 1536, sealed=True, clients=12, path="/x" * 60, deleted=False),
        SegmentStatus(1 << 61, None, sealed=False, clients=3, path="/a\nb", deleted=False),
    )
    lines = render_text(
        [judged(replace(REPORT, segments=segments))], Level.OK, "", colour=False
    ).splitlines()
    first = next(number for number, line in enumerate(lines) if "segment at" in line)
    assert max(map(len, lines)) == WIDTH
    rows = [line.split() for line in lines[first + 1 : first + 4]]
    shown = rows[1][-1].removeprefix("...")
    assert len(shown) > 30
    assert rows == [
        ["0", "0", "B", "sealed,", "deleted", "0", "-"],
        [str(1 << 60), "1.5", "KiB", "sealed", "12", "..." + ("/x" * 60)[-len(shown) :]],
        [str(1 << 61), "-", "active", "3", r"'/a\nb'"],
    ]


def test_table_fits() -> None:
    """Tables fit 100 columns and show the whole path, however large figures and path are."""
    process = Process(
        4194304, "tracing-stop", 999 * 86400.0 + 86399, 100.0, 1e9, 1023 << 20, 524288, 1048576
    )
    workers = (
        replace(WORKER, process=process, clients=1000000, restarts=99999),
        replace(WORKER, slot=1023, process=None, ready=False),
    )
    endpoint = "[fe80:1111:2222:3333:4444:5555:6666:7777]:65535"
    path = "/a-folder" * 30
    report = replace(
        REPORT,
        supervisor=process,
        workers=workers,
        listeners=(ListenerStatus(1023, endpoint, 4096, 4096),),
        file=FileStatus(path, 1 << 45, True, None, follow_name=True, missing=9e8),
        log=LogStatus(1 << 62, (1 << 63) - 1, 2000, 1 << 55, 1999, 1 << 54),
        totals=Totals(1000000, 1000000, 1 << 30, 99999, 4096, 800.0, 1 << 35, 3 << 20),
        state="waiting for file",
    )
    level, summary = summarize([judged(report)], "")
    lines = render_text([judged(report)], level, summary, colour=False).splitlines()
    assert max(map(len, lines[1:])) <= WIDTH
    assert path in "".join(line.strip() for line in lines)


def test_table_shows_what_is_not_known() -> None:
    """An unknown figure is shown as a dash, and an empty slot as missing."""
    unknown = Process(7, None, None, None, None, None, None, None)
    workers = (replace(WORKER, process=unknown), replace(WORKER, slot=1, process=None))
    report = replace(
        REPORT, workers=workers, totals=replace(REPORT.totals, cpu=None, pss=None, descriptors=None)
    )
    rows = [
        line.split()
        for line in render_text([judged(report)], Level.OK, "", colour=False).splitlines()
    ]
    assert ["worker", "0", "7", "-", "-", "-", "-", "-", "35", "0"] in rows
    assert ["worker", "1", "-", "missing", "-", "-", "-", "-", "35", "0"] in rows
    assert ["total", "-", "-", "-", "137", "0"] in rows


def test_fullest_queue() -> None:
    """Of the queues at one address, the fullest is shown with its slot."""
    listeners = (
        LISTENER,
        ListenerStatus(1, LISTENER.endpoint, 50, 100),
        ListenerStatus(2, LISTENER.endpoint, 60, 4096),
    )
    text = render_text([judged(replace(REPORT, listeners=listeners))], Level.OK, "", colour=False)
    assert ["0.0.0.0:4321", "3", "110", "50", "of", "100", "(50", "%),", "slot", "1"] in [
        line.split() for line in text.splitlines()
    ]


def test_colour_marks_faulty_workers() -> None:
    """Rows of faulty workers are coloured, and colours do not shift the columns."""
    findings = [judged(with_process(state="stopped"))]
    plain, coloured = (
        render_text(findings, Level.CRITICAL, "", colour=colour) for colour in (False, True)
    )
    [red] = [line for line in coloured.splitlines() if line.startswith("\x1b[31mworker ")]
    assert "worker 1 " in red
    assert coloured.replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", "") == plain


def test_metrics_of_the_log() -> None:
    """The log has its families; without a file, and where figures are unknown, they are absent."""
    log = LogStatus(100, 1234, segments=3, size=1200, retired=1, retired_size=50)
    lines = render_metrics(
        [judged(replace(REPORT, log=log, file=replace(MISSING, missing=2.5)))]
    ).splitlines()
    assert [
        line for line in lines if line.startswith(("tailsrv_log_", "tailsrv_file_missing"))
    ] == [
        'tailsrv_file_missing_seconds{server="*:4321"} 2.5',
        'tailsrv_log_start_bytes{server="*:4321"} 100',
        'tailsrv_log_end_bytes{server="*:4321"} 1234',
        'tailsrv_log_size_bytes{server="*:4321"} 1200',
        'tailsrv_log_segments{server="*:4321"} 3',
        'tailsrv_log_segments_retired{server="*:4321"} 1',
        'tailsrv_log_retired_bytes{server="*:4321"} 50',
    ]
    assert "tailsrv_log_" not in render_metrics([judged(replace(REPORT, log=None))])
    unknown = render_metrics([judged(replace(REPORT, log=replace(log, end=None, size=None)))])
    assert "tailsrv_log_start_bytes" in unknown
    assert "tailsrv_log_end_bytes" not in unknown
    assert "tailsrv_file_missing_seconds" not in unknown


def test_metrics_leave_out_what_is_not_known() -> None:
    """An unknown figure has no sample, and a family without samples is left out."""
    unknown = Process(7, None, None, None, None, None, None, None)
    text = render_metrics([judged(replace(REPORT, workers=(), supervisor=unknown))])
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "tailsrv_clients" in names
    assert not any(name.startswith("tailsrv_process_") for name in names)


@pytest.mark.parametrize(
    ("position", "end", "lag", "beyond"),
    [
        (90, 100, 10, False),
        (100, 100, 0, False),
        (101, 100, 0, True),
        (0, 0, 0, False),
        (None, 100, None, False),
        (100, None, None, False),
    ],
)
def test_lag(position: int | None, end: int | None, lag: int | None, beyond: bool) -> None:
    """The lag of a client is what it lacks of the log, and unknown if one of the two is unknown."""
    client = ClientHealth.of(ClientStatus(1, "192.0.2.7:1", 7, position), end)
    assert client == ClientHealth(1, "192.0.2.7:1", 7, position, lag, beyond)


def test_metrics_name_each_peer_once() -> None:
    """Clients without a peer are left out; of two with one peer, the larger lag is shown."""
    peer = "192.0.2.7:41234"
    clients = (
        ClientHealth(0, peer, 0, 90, 10),
        ClientHealth(0, peer, 0, 1, 99),
        ClientHealth(0, None, 0, 1, 99),
        ClientHealth(0, "[::1]:1", None, None, None),
    )
    families = {
        family.name: family
        for family in text_string_to_metric_families(
            render_metrics([judged(replace(REPORT, clients=clients))])
        )
    }
    assert [
        (sample.labels["peer"], sample.value)
        for sample in families["tailsrv_client_lag_bytes"].samples
    ] == [(peer, 99)]


def test_metrics_have_each_label_set_once() -> None:
    """If an impostor repeats entries, each set of labels is printed once, with the first value."""
    worker, client = replace(WORKER, clients=1), ClientHealth(0, "192.0.2.7:1", 0, 1, 1)
    report = replace(
        REPORT,
        state="serving",
        workers=(worker, replace(worker, clients=2)),
        listeners=(LISTENER, LISTENER, replace(LISTENER, slot=None), replace(LISTENER, slot=None)),
        clients=(client, client),
    )
    lines = render_metrics(
        [judged(report), judged(report), Finding(SERVER, HealthVerdict(Level.UNKNOWN))]
    ).splitlines()
    samples = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert 'tailsrv_worker_clients{server="*:4321",slot="0"} 1' in lines
    assert lines.count("# TYPE tailsrv_health_status gauge") == 1


@pytest.mark.parametrize("path", ["/a b", '/"', "/\\", "/\\n", "/\n", "/é", "/\x1b"])
def test_metrics_escape(path: str) -> None:
    """A path with special characters is read back unchanged by a parser."""
    text = render_metrics([judged(replace(REPORT, file=replace(REPORT.file, path=path)))])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["tailsrv_info"].samples[0].labels["path"] == path


def test_metrics_of_a_path_that_is_not_text() -> None:
    """Bytes of a path that are not UTF-8 are escaped, so that the output is valid UTF-8."""
    text = render_metrics([judged(replace(REPORT, file=replace(REPORT.file, path="/\udcff")))])
    families = {
        family.name: family for family in text_string_to_metric_families(text.encode().decode())
    }
    assert families["tailsrv_info"].samples[0].labels["path"] == r"/\udcff"

"""The command `tailsrv-health`: checks servers, prints the result, and exits with its level.

It inspects the selected servers in parallel threads, and prints one result for all of them. The
check is often run by root, and any user can create control sockets with arbitrary names. Such
sockets must neither use up the time of the check nor cause a false alarm: see `in_turns` and
`doubtful_servers`.
"""

import dataclasses
import io
import json
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tailsrv.arguments import make_health_parser
from tailsrv.health.control_client import (
    EndedError,
    InspectError,
    NoSupervisorError,
    NotOursError,
    find,
    ports,
)
from tailsrv.health.inspection import inspect
from tailsrv.health.prometheus import render_metrics
from tailsrv.health.report import Finding, HealthReport, HealthVerdict, Level, Server, judge
from tailsrv.health.text import render_text, summarize
from tailsrv.linux.process import raise_descriptor_limit

# Number of servers that are inspected in parallel. An inspection mostly waits for answers.
PARALLEL_INSPECTIONS = 32

# Seconds after which no further inspection is started. Any user can make a check find thousands of
# servers.
START_LIMIT = 10.0
# Seconds between two inspections of a server that has ended, or has been replaced, meanwhile.
LOOK_AGAIN = 0.05

Outcome = HealthReport | InspectError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tailsrv-health` with the arguments `argv` and return the exit status, which is a Level.

    `argv` does not contain the program name. None means the arguments of this process.
    """
    end_at_interrupt()
    try:
        options = parse(make_health_parser(), argv)
        # Each orphaned worker is asked on a connection of its own.
        raise_descriptor_limit()
        level, text = check(options)
    except SystemExit as end:
        # argparse exits with 2 after a usage error, which would mean CRITICAL.
        return write("", Level.UNKNOWN if end.code else Level.OK)
    return write(text, level, encoding="utf-8" if options.format == "prometheus" else None)


def end_at_interrupt() -> None:
    """Let SIGINT (Ctrl-C) kill this process.

    A KeyboardInterrupt inside a lock of the threading module can surface as a different exception.
    """
    # Otherwise SIGINT is ignored, for example in a background job, and stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Return the options in `argv`. If they are wrong, print why, and raise SystemExit."""
    options = parser.parse_args(argv)
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"argument -p/--port: must be from 1 to 65535, not {options.port}")
    if options.pid == 0:
        parser.error("argument --pid: must be 1 or more, not 0")
    return options


def check(options: Namespace) -> tuple[Level, str]:
    """Return the worst level of the servers that `options` select, and the text to print."""
    try:
        outcomes = find_and_examine(options)
    except OSError as error:
        return Level.UNKNOWN, render(
            [], options.format, Level.UNKNOWN, f"cannot look for servers: {error}"
        )
    doubtful = doubtful_servers(list(outcomes))
    asked_for = options.port is not None or options.pid is not None
    findings = [
        finding
        for server, outcome in outcomes.items()
        if (finding := to_finding(server, outcome, asked_for, server in doubtful)) is not None
    ]
    others = sum(isinstance(outcome, NotOursError) for outcome in outcomes.values())
    level, summary = summarize(findings, none_found_message(options, others))
    return level, render(findings, options.format, level, summary)


def render(findings: Sequence[Finding], form: str, level: Level, summary: str) -> str:
    """Return the text to print. `form` is the value of `--format`."""
    match form:
        case "json":
            return render_json(findings, level, summary)
        case "prometheus":
            return render_metrics(findings)
        case _:
            return render_text(findings, level, summary, wants_colour(os.environ))


def find_and_examine(options: Namespace) -> dict[Server, Outcome]:
    """Return the servers that `options` select, in the order of their endpoints.

    With each comes the report or the error of its inspection. If a server has ended meanwhile,
    another one may have replaced it, or its workers may serve on. Then look again, but not beyond
    START_LIMIT. Raises OSError, as `find` does.
    """
    until = time.monotonic() + START_LIMIT
    outcomes = examine_all(find(options.port, options.pid), options.clients, until)
    while ended := [server for server, it in outcomes.items() if isinstance(it, EndedError)]:
        endpoints = {endpoint for server in ended for endpoint in server.endpoints}
        again = [
            server
            for server in find(options.port, options.pid)
            if endpoints.intersection(server.endpoints)
        ]
        if not again or time.monotonic() > until:
            break
        for server in ended:
            del outcomes[server]
        outcomes |= examine_all(again, options.clients, until)
        time.sleep(LOOK_AGAIN)
    return dict(sorted(outcomes.items(), key=lambda item: item[0].endpoints))


def examine_all(servers: Sequence[Server], clients: bool, until: float) -> dict[Server, Outcome]:
    """Return for each of `servers`, in their order, the report or the error of its inspection."""
    ask = partial(examine, clients=clients, until=until)
    turns = in_turns(servers)
    try:
        with ThreadPoolExecutor(PARALLEL_INSPECTIONS) as pool:
            outcomes = dict(zip(turns, pool.map(ask, turns), strict=True))
    except RuntimeError:
        # The system cannot start another thread.
        outcomes = {server: ask(server) for server in turns}
    return {server: outcomes[server] for server in servers}


def in_turns(servers: Sequence[Server]) -> list[Server]:
    """Return `servers` in rounds: the first server of each user, then the second of each, etc.

    So a user with many servers does not delay the check of the servers of other users.
    """
    counts: Counter[int | None] = Counter()
    turns = {}
    for server in servers:
        turns[server] = counts[server.uid]
        counts[server.uid] += 1
    return sorted(servers, key=turns.__getitem__)


def examine(server: Server, clients: bool, until: float) -> Outcome:
    """Return the report on `server`, or the error if it cannot be inspected.

    After `until`, a time of time.monotonic(), `server` is not inspected any more.
    """
    if time.monotonic() > until:
        return InspectError(
            f"not asked: checks of other servers took longer than {START_LIMIT:g} seconds;"
            " select this server with --pid or -p"
        )
    try:
        return inspect(server, clients=clients)
    except InspectError as error:
        return error
    except OSError as error:
        # This process has no descriptor or memory left.
        return InspectError(f"cannot be asked: {error}")
    except Exception as error:
        # An unforeseen answer of one server must not prevent the verdict on the others.
        return InspectError(
            f"internal error, please report it: {type(error).__name__}: {str(error)[:100]!a}"
        )


def to_finding(
    server: Server, outcome: Outcome, asked_for: bool, doubtful: bool = False
) -> Finding | None:
    """Return the finding on `server`, None if the check should not mention it.

    It does not mention a server that has ended, nor one of another user, unless `-p` or `--pid` has
    selected that one (`asked_for`). If the server is `doubtful`, its level is OK or UNKNOWN.
    """
    match outcome:
        case HealthReport():
            return Finding(outcome.server, soften(judge(outcome), doubtful), outcome)
        case EndedError():
            return None
        case NotOursError() if not asked_for:
            return None
        case _:
            # If the user is unknown, the queue of the socket may be full because the socket belongs
            # to an impostor, which wants to cause a false alarm.
            doubtful = doubtful or (server.uid is None and not asked_for)
            verdict = HealthVerdict(outcome.level, (str(outcome),))
            orphan_report = outcome.report if isinstance(outcome, NoSupervisorError) else None
            return Finding(server, soften(verdict, doubtful), orphan_report=orphan_report)


def doubtful_servers(servers: Sequence[Server]) -> set[Server]:
    """Return the servers that may be impostors.

    Any user can listen at a control socket with the port of another user's server. So a server is
    doubtful if another user has a server with one of its ports. Servers of root and of this
    process's user are never doubtful.
    """
    users: dict[int, set[object]] = {}
    for server in servers:
        for port in ports(server):
            users.setdefault(port, set()).add(
                server.endpoints if server.uid is None else server.uid
            )
    return {
        server
        for server in servers
        if not server.ours
        and server.uid != 0
        and any(len(users[port]) > 1 for port in ports(server))
    }


def soften(verdict: HealthVerdict, doubtful: bool) -> HealthVerdict:
    """Return `verdict`, with level UNKNOWN in place of WARNING or CRITICAL if `doubtful`."""
    if doubtful and verdict.level is not Level.OK:
        return HealthVerdict(Level.UNKNOWN, verdict.reasons)
    return verdict


def none_found_message(options: Namespace, others: int) -> str:
    """Return the message for a check that can inspect no server.

    `others` is the number of servers of other users that it found.
    """
    where = "in this network namespace"
    if options.port is not None:
        return f"no tailsrv on port {options.port} {where}"
    if options.pid is not None:
        return f"no tailsrv supervisor with pid {options.pid} {where}"
    return f"no tailsrv of this user {where}" + (f", {others} of other users" if others else "")


def render_json(findings: Sequence[Finding], level: Level, summary: str) -> str:
    """Return the findings as one JSON object on one line, with exact numbers."""
    servers = [
        {
            **dataclasses.asdict(finding.server),
            "level": finding.verdict.level.name,
            "reasons": finding.verdict.reasons,
            "report": finding.report
            and {
                name: value
                for name, value in dataclasses.asdict(finding.report).items()
                if name != "server"
            },
            "orphan_report": finding.orphan_report and dataclasses.asdict(finding.orphan_report),
        }
        for finding in findings
    ]
    return (
        json.dumps({"level": level.name, "status": level, "summary": summary, "servers": servers})
        + "\n"
    )


def wants_colour(environ: Mapping[str, str]) -> bool:
    """Return whether to colour the text.

    Standard output must be a terminal, and neither NO_COLOR (https://no-color.org) nor TERM may
    disable colour.
    """
    return bool(
        sys.stdout
        and sys.stdout.isatty()
        and not environ.get("NO_COLOR")
        and environ.get("TERM") != "dumb"
    )


def write(text: str, level: Level, encoding: str | None = None) -> int:
    """Write `text` to standard output and return the exit status.

    If `encoding` is None, the encoding is that of the user's locale. It is no error if the reader
    of the output closes the pipe early.
    """
    # Standard output was closed when this process started.
    if sys.stdout is None:
        return Level.UNKNOWN
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        return give_up_writing(error, level)
    return level


def give_up_writing(error: OSError, level: Level) -> Level:
    """Return the exit status after a failure to write to standard output.

    Redirects standard output to /dev/null, because the interpreter flushes it again at exit.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    if isinstance(error, BrokenPipeError):
        return level
    print(f"tailsrv-health: cannot write: {error}", file=sys.stderr)
    return Level.UNKNOWN

"""The command `tailsrv-health`: looks at the servers that it is asked for, and says how they are."""

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
from tailsrv.health.control_client import EndedError, InspectError, NotOursError, find, ports
from tailsrv.health.inspection import inspect
from tailsrv.health.prometheus import render_metrics
from tailsrv.health.report import Finding, HealthReport, HealthVerdict, Level, Server, judge
from tailsrv.health.text import render_text, summarize

# servers that are looked at in parallel: most of the time is spent waiting for answers
PARALLEL_INSPECTIONS = 32

# seconds in which servers are begun with; any user can make a check find thousands
START_LIMIT = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tailsrv-health` with `argv` (sys.argv if None); return the exit status, which is a Level."""
    end_at_interrupt()
    try:
        options = parse(make_health_parser(), argv)
        level, text = check(options)
    except SystemExit as end:
        # argparse's 2 would read as CRITICAL
        return write("", Level.UNKNOWN if end.code else Level.OK)
    return write(text, level, encoding="utf-8" if options.format == "prometheus" else None)


def end_at_interrupt() -> None:
    """Let Ctrl-C end us as the kernel does: an exception may come within the locks by which threads wait, and turn into another."""
    # else it is ignored, in the background for instance
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Return the options in `argv`; a usage error is told, and raises SystemExit."""
    options = parser.parse_args(argv)
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"port must be from 1 to 65535, not {options.port}")
    if options.pid == 0:
        parser.error("pid must be 1 or more")
    return options


def check(options: Namespace) -> tuple[Level, str]:
    """Return how well the servers are that `options` ask for, and the text that says so."""
    try:
        servers = find(options.port, options.pid)
    except OSError as error:
        return Level.UNKNOWN, render(
            [], options.format, Level.UNKNOWN, f"cannot look for servers: {error}"
        )
    outcomes = examine_all(servers, options.clients)
    doubtful = doubtful_servers(servers)
    asked_for = options.port is not None or options.pid is not None
    findings = [
        finding
        for server, outcome in zip(servers, outcomes, strict=True)
        if (finding := to_finding(server, outcome, asked_for, server in doubtful)) is not None
    ]  # fmt: skip
    strangers = sum(isinstance(outcome, NotOursError) for outcome in outcomes)
    level, summary = summarize(findings, none_found_message(options, strangers))
    return level, render(findings, options.format, level, summary)


def render(findings: Sequence[Finding], form: str, level: Level, summary: str) -> str:
    """Return what is to be said, in the form that `--format` names."""
    match form:
        case "json":
            return render_json(findings, level, summary)
        case "prometheus":
            return render_metrics(findings)
        case _:
            return render_text(findings, level, summary, wants_colour(os.environ))


def examine_all(servers: Sequence[Server], clients: bool) -> list[HealthReport | InspectError]:
    """Return for each server what `inspect` returns or raises."""
    ask = partial(examine, clients=clients, until=time.monotonic() + START_LIMIT)
    turns = in_turns(servers)
    try:
        with ThreadPoolExecutor(PARALLEL_INSPECTIONS) as pool:
            outcomes = dict(zip(turns, pool.map(ask, turns), strict=True))
    except RuntimeError:
        # no room for threads
        outcomes = {server: ask(server) for server in turns}
    return [outcomes[server] for server in servers]


def in_turns(servers: Sequence[Server]) -> list[Server]:
    """Return `servers`, each user's first before anybody's second: many of one hold up no others."""
    counts: Counter[int | None] = Counter()
    turns = {}
    for server in servers:
        turns[server] = counts[server.uid]
        counts[server.uid] += 1
    return sorted(servers, key=turns.__getitem__)


def examine(server: Server, clients: bool, until: float) -> HealthReport | InspectError:
    """Return what `inspect` returns or raises, if it is not later than `until` already."""
    if time.monotonic() > until:
        return InspectError("not asked: other servers have taken all the time of this check")
    try:
        return inspect(server, clients=clients)
    except InspectError as error:
        return error
    except OSError as error:
        # no descriptors, no memory
        return InspectError(f"cannot be asked: {error}")
    except Exception as error:
        # no answer of one server may cost the verdict on the others
        return InspectError(f"cannot be inspected: {type(error).__name__}: {str(error)[:100]!a}")


def to_finding(
    server: Server, outcome: HealthReport | InspectError, asked_for: bool, doubtful: bool = False
) -> Finding | None:
    """Return the finding on a server, None if it has ended, or is another user's and not asked for.

    Of a `doubtful` server no fault is more than UNKNOWN.
    """
    match outcome:
        case HealthReport():
            return Finding(outcome.server, soften(judge(outcome), doubtful), outcome)
        case EndedError():
            return None
        case NotOursError() if not asked_for:
            return None
        case _:
            # A user whom we could not see may be one who fills the queue of a name to alarm us.
            doubtful = doubtful or (server.uid is None and not asked_for)
            return Finding(server, soften(HealthVerdict(outcome.level, (str(outcome),)), doubtful))


def doubtful_servers(servers: Sequence[Server]) -> set[Server]:
    """Return those that may be an impostor's: any user can take a name for the port of another's.

    Root's servers and our own are not, nor are those of a user who is the only one on their ports.
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
        if not server.ours and server.uid != 0 and any(len(users[port]) > 1 for port in ports(server))
    }  # fmt: skip


def soften(verdict: HealthVerdict, doubtful: bool) -> HealthVerdict:
    """Return the verdict on a server, which for a doubtful one is UNKNOWN at most."""
    if doubtful and verdict.level is not Level.OK:
        return HealthVerdict(Level.UNKNOWN, verdict.reasons)
    return verdict


def none_found_message(options: Namespace, strangers: int) -> str:
    """Return the sentence for the case that no server was found."""
    if options.port is not None:
        return f"no tailsrv on port {options.port}"
    if options.pid is not None:
        return f"no tailsrv has pid {options.pid}"
    return "no tailsrv of this user" + (f", {strangers} of other users" if strangers else "")


def render_json(findings: Sequence[Finding], level: Level, summary: str) -> str:
    """Return the findings as one JSON object on one line, all figures exact."""
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
        }
        for finding in findings
    ]
    return (
        json.dumps({"level": level.name, "status": level, "summary": summary, "servers": servers})
        + "\n"
    )


def wants_colour(environ: Mapping[str, str]) -> bool:
    """Tell whether standard output is a terminal that wants colour (https://no-color.org)."""
    return bool(
        sys.stdout
        and sys.stdout.isatty()
        and not environ.get("NO_COLOR")
        and environ.get("TERM") != "dumb"
    )


def write(text: str, level: Level, encoding: str | None = None) -> int:
    """Write `text` to standard output, in the user's encoding if None, and return the exit status.

    A reader who has seen enough is no error.
    """
    # closed before we started
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
    """Return the exit status after standard output has failed, and let the interpreter's own flush at the end go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    if isinstance(error, BrokenPipeError):
        return level
    print(f"tailsrv-health: cannot write: {error}", file=sys.stderr)
    return Level.UNKNOWN

"""Turns the measured rounds into results: medians, JSON, Markdown tables and charts."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import charts
from generator import Numbers
from scenarios import FIGURES, Scenario
from servers import Server

# Returns the text of a table cell for a scenario, a server and the key of a figure.
Show = Callable[[Scenario, Server, str], str]
NOTHING = "-"
HEADROOM = (
    "Ratios to threads of the load generator that do nothing but send, as many as the server has"
    " workers. At 1 the server is at the limit of what can be measured."
)


@dataclass
class Cell:
    """The results of one server in one scenario: the figures of each round, or why there are none.

    `skipped` and `failed` are empty if the server was measured, and say why not otherwise.
    """

    clients: int
    rounds: list[Numbers] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""

    @property
    def medians(self) -> Numbers:
        """The median of each figure over all rounds; empty if a round failed."""
        if self.failed or not self.rounds:
            return {}
        return {
            key: statistics.median(figures[key] for figures in self.rounds)
            for key in self.rounds[0]
        }


class Results:
    """All results, by scenario and server, with the machine and the settings they came from."""

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        servers: Sequence[Server],
        machine: dict[str, object],
        settings: dict[str, object],
    ):
        self.scenarios, self.servers = scenarios, servers
        self.machine, self.settings = machine, settings
        self.cells = {
            scenario.name: {server.name: _cell(scenario, server) for server in servers}
            for scenario in scenarios
        }

    def cell(self, scenario: Scenario, server: Server) -> Cell:
        """Return the results of `server` in `scenario`."""
        return self.cells[scenario.name][server.name]

    def failures(self) -> list[str]:
        """Return one line for each scenario and server that failed."""
        return [
            f"{scenario}: {server}: {cell.failed}"
            for scenario, row in self.cells.items()
            for server, cell in row.items()
            if cell.failed
        ]

    def write(self, folder: Path) -> None:
        """Write results.json, results.md and the charts to `folder`, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        (folder / "results.md").write_text("\n".join(_markdown(self)) + "\n")
        for name, document in _charts(self):
            (folder / name).write_text(document)

    def as_json(self) -> dict[str, object]:
        """Return all results, with the figures of each round."""
        cells = {
            scenario: {
                server: {**vars(cell), "medians": cell.medians} for server, cell in row.items()
            }
            for scenario, row in self.cells.items()
        }
        return {
            "machine": self.machine,
            "settings": self.settings,
            "servers": {server.name: server.command for server in self.servers},
            "figures": {key: vars(figure) for key, figure in FIGURES.items()},
            "results": cells,
        }


def _cell(scenario: Scenario, server: Server) -> Cell:
    return Cell(scenario.count(server), skipped=scenario.obstacle(server))


# The table


def brief(figures: Numbers) -> str:
    """Format figures on one line."""
    return ", ".join(
        f"{_number(value)} {FIGURES[key].unit} {FIGURES[key].label}".replace("  ", " ")
        for key, value in figures.items()
    )


def _markdown(results: Results) -> Iterator[str]:
    machine, tables = results.machine, Tables(results)
    yield from ("# Benchmark", "")
    yield (
        f"{machine['date']}, {machine['processors']} processors ({machine['processor']}),"
        f" {machine['memory_mib']} MiB, {machine['kernel']}, Python {machine['python']},"
        f" revision {machine['revision'] or 'unknown'}."
        f" Medians of {results.settings['rounds']} interleaved rounds."
    )
    if tables.servers:
        yield from tables.section(
            f"Ratios to {tables.servers[0].name}",
            "For rates the inverse is shown, so below 1 is better everywhere.",
            tables.ratio,
        )
        yield from tables.section(
            "Figures", "contrib/bench/README.md explains them.", tables.figure
        )
        yield from tables.section("Headroom of the load generator", HEADROOM, tables.headroom)
    yield from _remarks(results)


class Tables:
    """The Markdown tables, with a row for each scenario and figure and a column for each server."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.servers = [server for server in results.servers if not server.bare]
        self._bare = {server.bare: server for server in results.servers if server.bare}

    def section(self, title: str, remark: str, show: Show) -> Iterator[str]:
        """Yield the lines of a table with its heading; nothing if all cells are empty.

        `show` returns the text of a cell, NOTHING for an empty one.
        """
        if rows := list(self._rows(show)):
            yield from ("", f"## {title}", "", remark, "")
            yield (
                "| scenario | figure | " + " | ".join(server.name for server in self.servers) + " |"
            )
            yield "| --- | --- |" + " ---: |" * len(self.servers)
            yield from rows

    def ratio(self, scenario: Scenario, server: Server, key: str) -> str:
        """Return the ratio of a figure to the first server's; above 1 is worse."""
        figure = FIGURES[key]
        # A figure without a unit is a count, such as the number of clients. It is no better or
        # worse than another one.
        if figure.of_load or not figure.unit:
            return NOTHING
        return self._ratio(scenario, server, self.servers[0], key)

    def figure(self, scenario: Scenario, server: Server, key: str) -> str:
        """Return the figure itself, with its unit."""
        found = self._value(scenario, server, key)
        return (
            NOTHING
            if found is None or FIGURES[key].of_load
            else f"{_number(found)} {FIGURES[key].unit}".rstrip()
        )

    def headroom(self, scenario: Scenario, server: Server, key: str) -> str:
        """Return the ratio of a figure to the bare sender's, or how busy the load generator was."""
        found, bare = self._value(scenario, server, key), self._bare.get(server.workers)
        if FIGURES[key].of_load and found is not None:
            return f"{found:.0f} {FIGURES[key].unit}"
        return self._ratio(scenario, server, bare, key) if bare else NOTHING

    def _value(self, scenario: Scenario, server: Server, key: str) -> float | None:
        return self.results.cell(scenario, server).medians.get(key)

    def _ratio(self, scenario: Scenario, server: Server, base: Server, key: str) -> str:
        value = self._value(scenario, server, key) or 0
        base_value = self._value(scenario, base, key) or 0
        if value <= 0 or base_value <= 0:
            return NOTHING
        return f"{value / base_value if FIGURES[key].lower_is_better else base_value / value:.2f}"

    def _rows(self, show: Show) -> Iterator[str]:
        for scenario in self.results.scenarios:
            medians = [self.results.cell(scenario, server).medians for server in self.servers]
            for key in next(filter(None, medians), {}):
                cells = [show(scenario, server, key) for server in self.servers]
                if any(cell != NOTHING for cell in cells):
                    yield f"| {scenario.name} | {FIGURES[key].label} | " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _remarks(results: Results) -> Iterator[str]:
    remarks = []
    for scenario in results.scenarios:
        for server in results.servers:
            cell = results.cell(scenario, server)
            if server.bare:
                continue
            if cell.skipped:
                remarks.append(f"- {scenario.name}: {server.name}: left out, {cell.skipped}.")
            elif cell.failed:
                remarks.append(f"- {scenario.name}: {server.name}: **failed**, {cell.failed}.")
            elif cell.clients < scenario.clients:
                remarks.append(
                    f"- {scenario.name}: {server.name}:"
                    f" {cell.clients} clients, not {scenario.clients}."
                )
    if remarks:
        yield from ("", "## Remarks", "", *remarks)


# The charts


@dataclass(frozen=True)
class Chart:
    """A chart of one figure of one family of scenarios over the number of clients."""

    name: str
    title: str
    subtitle: str
    family: str
    figure: str
    log: bool = True


BY_CLIENTS = (
    Chart(
        "latency.svg",
        "Latency: append to arrival at the last client",
        "microseconds, median; lower is better",
        "fanout",
        "last_p50",
    ),
    Chart(
        "throughput.svg",
        "Throughput: clients that replay",
        "MB/s, all together; higher is better",
        "replay",
        "throughput",
        log=False,
    ),
    Chart(
        "memory.svg",
        "Memory: all processes of the server",
        "MiB (PSS), quiet clients; lower is better",
        "idle",
        "pss",
    ),
)


def _charts(results: Results) -> Iterator[tuple[str, str]]:
    for chart in BY_CLIENTS:
        servers = [server for server in results.servers if not server.bare]
        series = {server.name: _points(results, server, chart) for server in servers}
        if series := {name: points for name, points in series.items() if points}:
            values = [value for points in series.values() for _, value in points]
            y = (charts.log_axis if chart.log else charts.linear_axis)(
                FIGURES[chart.figure].unit, values
            )
            x = charts.log_axis(
                "clients", [clients for points in series.values() for clients, _ in points]
            )
            yield chart.name, charts.draw(chart.title, chart.subtitle, x, y, series)
    yield from _workers_chart(results)


def _points(results: Results, server: Server, chart: Chart) -> list[tuple[float, float]]:
    found = []
    for scenario in results.scenarios:
        cell = results.cell(scenario, server)
        if scenario.family == chart.family and cell.medians.get(chart.figure, 0) > 0:
            found.append((cell.clients, cell.medians[chart.figure]))
    return sorted(found)


# Figures that more workers should improve, by family of scenarios. The chart shows the scenario
# with the most clients of each family.
SCALING = {
    "replay": ("throughput", "replay"),
    "fanout": ("last_p50", "last client of an append"),
    "connect": ("burst", "connections at once"),
}


def _workers_chart(results: Results) -> Iterator[tuple[str, str]]:
    """Yield the chart of the speed of tailsrv over its number of workers, if one can be drawn."""
    tailsrvs = [server for server in results.servers if server.is_ours]
    series = {}
    for family, (key, name) in SCALING.items():
        scenario = max(
            (found for found in results.scenarios if found.family == family),
            key=lambda found: found.clients,
            default=None,
        )
        if scenario and (points := _scaling(results, scenario, tailsrvs, key)):
            series[f"{name}, {scenario.clients:,}"] = points
    if series:
        x = charts.count_axis("workers", _all(series, 0))
        y = charts.linear_axis("times one worker", _all(series, 1))
        title, subtitle = (
            "Speed against workers",
            "times that of one worker, by kind of work and number of clients; higher is better",
        )
        yield "workers.svg", charts.draw(title, subtitle, x, y, series)


def _scaling(
    results: Results, scenario: Scenario, servers: Sequence[Server], key: str
) -> list[tuple[float, float]]:
    """Return the numbers of workers, each with the speed relative to that of one worker."""
    values = {
        server.workers: value
        for server in servers
        if (value := results.cell(scenario, server).medians.get(key))
    }
    if 1 not in values:
        return []
    lower = FIGURES[key].lower_is_better
    return [
        (workers, values[1] / value if lower else value / values[1])
        for workers, value in values.items()
    ]


def _all(series: charts.Series, index: int) -> Iterable[float]:
    return [point[index] for points in series.values() for point in points]

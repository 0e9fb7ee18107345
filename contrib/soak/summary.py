"""The summary of a run: what was wrong, as text for people and as JSON for programs."""

import json
from dataclasses import dataclass, fields

from samples import Sample
from tally import Tally

# Bounds for the growth of memory: the end may exceed the start by this factor plus this many bytes.
# Python does not return all free memory to the kernel.
MEMORY_FACTOR, MEMORY_SLACK = 1.25, 2 << 20
MIB = 1 << 20


@dataclass(frozen=True)
class Summary:
    """The results of a run.

    `start` and `end` are samples without clients, from before the faults and after them. They are
    None if the run ended before they were taken.
    """

    command: str
    seed: int
    seconds: float
    log_bytes: int
    status: int | None
    tally: Tally
    start: Sample | None
    end: Sample | None
    peak: Sample
    log_lines: int
    # Lines of the log that should not be there.
    bad_lines: list[str]

    def reasons(self) -> list[str]:
        """Return what was wrong; empty if nothing was."""
        found = list(self.tally.wrong)
        found += [f"in the log: {line}" for line in self.bad_lines]
        if self.status != 0:
            found.append(f"the server exited with status {self.status}")
        if self.tally.checked == 0:
            found.append("no byte was checked")
        return found + self._growth()

    def _growth(self) -> list[str]:
        """Return which resources have grown since the start."""
        if self.start is None or self.end is None:
            return ["the server's memory and descriptors are not known at the start and at the end"]
        found = []
        if self.end.pss > self.start.pss * MEMORY_FACTOR + MEMORY_SLACK:
            found.append(
                f"memory has grown from {self.start.pss / MIB:.1f} to {self.end.pss / MIB:.1f} MiB"
            )
        for name in ("processes", "descriptors", "threads"):
            before, after = getattr(self.start, name), getattr(self.end, name)
            if before != after:
                found.append(f"{name}: {before} at the start, {after} at the end")
        return found

    def text(self) -> str:
        """Return the summary as text."""
        tally, minutes = self.tally, self.seconds / 60
        lines = [
            f"{'WRONG' if self.reasons() else 'OK'}:"
            f" {minutes:.1f} minutes of {self.command}, seed {self.seed}",
            *(f"  {reason}" for reason in self.reasons()),
            "",
            f"bytes checked      {tally.checked:,} of a log of {self.log_bytes:,}",
            f"connections        {tally.connections.total():,}: {_counts(tally.connections)}",
            f"faults survived    {tally.faults.total():,}: {_counts(tally.faults)}",
            f"longest wait       {tally.longest_wait:.0f} s until a client received waiting bytes",
            f"lost in accept     {tally.lost}, because their worker was killed"
            " after accepting the connection and before reporting it",
            f"deleted            {tally.gone} connections that were closed because their bytes had"
            " been deleted",
            *(
                [f"rotations          {tally.rotations.total():,}: {_counts(tally.rotations)}"]
                if tally.rotations
                else []
            ),
            f"log                {self.log_lines:,} lines",
            "",
            f"{'':15}{'start':>12}{'peak':>12}{'end':>12}",
        ]
        for name, unit in (
            ("processes", 0),
            ("descriptors", 0),
            ("threads", 0),
            ("pss", MIB),
            ("sockets", MIB),
        ):
            values = (getattr(sample, name, None) for sample in (self.start, self.peak, self.end))
            lines.append(f"{name:15}" + "".join(f"{_figure(value, unit):>12}" for value in values))
        return "\n".join(lines)

    def json(self) -> str:
        """Return the summary as JSON."""
        return json.dumps(
            {"ok": not self.reasons(), "reasons": self.reasons(), **_plain(self)},
            default=_plain,
            indent=1,
        )


def _plain(what: object) -> dict[str, object]:
    return {name: value for name, value in vars(what).items() if not name.startswith("_")}


def _figure(value: int | None, unit: int) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.1f} MiB" if unit else str(value)


def _counts(counter: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items()))


def peak(samples: list[Sample]) -> Sample:
    """Return the largest value of each figure in `samples`."""
    return Sample(
        *(
            max((getattr(sample, field.name) for sample in samples), default=0)
            for field in fields(Sample)
        )
    )

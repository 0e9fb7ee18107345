"""Makes workers the first choice of the kernel's OOM killer."""

from contextlib import suppress

_ADJUSTMENT = "/proc/self/oom_score_adj"
_HIGHEST = 1000  # OOM_SCORE_ADJ_MAX of linux/oom.h

# Half of what may be had: the supervisor holds a descriptor of each client and so may be the larger process by far
# [measured: with 10 and 100 more, a full memory cgroup still cost the supervisor].
_MORE = 500


def volunteer() -> None:
    """Raise this process's `oom_score_adj` above the one that it has inherited (proc_pid_oom_score_adj(5)).

    A worker's death costs no client anything, the supervisor's costs them all. Raising one's own adjustment takes no
    privilege. Where /proc does not allow it, the kernel's choice stays as it is.
    """
    with suppress(OSError, ValueError):
        with open(_ADJUSTMENT, encoding="ascii") as file:
            inherited = int(file.read())
        with open(_ADJUSTMENT, "w", encoding="ascii") as file:
            file.write(str(min(inherited + _MORE, _HIGHEST)))

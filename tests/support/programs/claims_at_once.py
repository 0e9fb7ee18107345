"""Makes four processes claim and release client places at the same time."""

import os

from tailsrv.client_limit import ClientLimit
from tailsrv.shared_counts import SharedCounts

limit, workers, rounds = 50, 4, 20000
client_limit = ClientLimit(limit, SharedCounts(workers))
pids = []
for slot in range(workers):
    if (pid := os.fork()) == 0:
        have = 0
        for turn in range(rounds):
            if turn % 7 == 6:
                have = max(0, have - 3)
                client_limit.record(slot, have)
            elif client_limit.claim(slot, have + 1):
                have += 1
        client_limit.record(slot, have)
        os._exit(have)
    pids.append(pid)
had = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
assert sum(had) <= limit, had
left = limit - sum(had)
assert all(client_limit.claim(0, had[0] + count + 1) for count in range(left))
assert not client_limit.claim(0, had[0] + left + 1)
print("exact")

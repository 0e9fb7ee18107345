"""Shows progress on a terminal that is then closed, and prints what the terminal received."""

import os
import pty

from tailsrv.client.tssync import Progress

near, far = pty.openpty()
os.dup2(far, 2)
os.close(far)
progress = Progress("copy")
progress.grow(0, None, 0.0)
progress.grow(1000, None, 1.0)
print(ascii(os.read(near, 1000)))
os.close(near)
progress.grow(2000, None, 2.0)
progress.grow(3000, None, 3.0)
progress.clear()

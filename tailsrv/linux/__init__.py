"""The interfaces of Linux that the other packages use. It imports nothing else of tailsrv."""

"""tailsrv: `tail -f` as a TCP server."""

__version__ = "1.0.0"

"""tailsrv: like `tail -f`, as a server."""

__version__ = "1.0.0"

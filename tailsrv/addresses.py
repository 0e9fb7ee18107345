"""Formats and parses `HOST:PORT`. Pure: no name is looked up."""

from tailsrv.formatting import parse_digits


class EndpointError(ValueError):
    """A text is not a valid HOST:PORT; the message says why, in one line."""


def endpoint(host: str, port: int) -> str:
    """Return `HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(text: str) -> tuple[str, int]:
    """Split `HOST:PORT`; return the host without brackets, and the port, which is from 1 to 65535.

    Raises EndpointError if `text` has another form or the port is out of range.
    """
    host, colon, digits = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not colon or not bare:
        raise EndpointError(f"not HOST:PORT: {text!r}")
    if ":" in bare and not bracketed:
        raise EndpointError(
            f"not HOST:PORT: {text!r}; write an IPv6 address in brackets: [::1]:4321"
        )
    if (port := parse_digits(digits)) is None:
        raise EndpointError(f"not a port: {digits!r} in {text!r}")
    return check_port(bare, port)


def check_port(host: str, port: int) -> tuple[str, int]:
    """Return `host` and `port` if `port` is one that a client can connect to, from 1 to 65535.

    Raises EndpointError otherwise.
    """
    if not 1 <= port <= 65535:
        raise EndpointError(f"port must be from 1 to 65535, not {port}")
    return host, port

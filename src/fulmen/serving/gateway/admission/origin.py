"""Where a request to a server without keys may come from: this machine, and no page of another site.

Whoever reaches such a server may use it, and a browser on this machine reaches it for any page that it shows.
A page's own requests carry its origin. A name that its owner points at 127.0.0.1 after the page was loaded
(DNS rebinding) makes the browser take server and page for one site; the Host header still has that name.
"""

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from fulmen.serving.gateway.errors import ApiError

_REMEDY = "a server without keys answers to localhost alone; make a key: fulmen keys add NAME"


def require_local(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ApiError 421 for a Host, 403 for an Origin, that does not name this machine.

    None at all passes: a browser sends Host always, and Origin whenever another site's page asks.
    """
    for name, value in headers:
        text = value.decode("latin-1")
        if name == b"host" and not is_loopback(f"//{text}"):
            raise ApiError(421, f"Host {text[:80]!r} is not this machine; {_REMEDY}", "Host")
        if name == b"origin" and not is_loopback(text):
            raise ApiError(403, f"Origin {text[:80]!r} is not this machine; {_REMEDY}", "Origin")


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine by any of its own names or addresses, at any port."""
    try:
        host = (urlsplit(url).hostname or "").removesuffix(".")
        return host == "localhost" or host.endswith(".localhost") or ip_address(host).is_loopback
    except ValueError:
        return False

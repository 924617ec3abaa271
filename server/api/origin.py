"""Who may change the server's state: not a page of another site, by way of somebody's browser.

A server on a local port has no authentication, and every page that a browser of that machine shows
can send requests to it. Routes that read a JSON body are safe: a browser asks first, and gets no
leave (there are no CORS headers). What needs no body must look at what browsers say of themselves:
each of their POSTs names the page's origin. A page whose name was made to resolve to this machine
(DNS rebinding) has an origin that is its own host, hence names are not enough; only addresses and
`localhost` cannot be rebound.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

from server.errors import Forbidden

_OWN_SITES = (None, "same-origin", "none")  # of Sec-Fetch-Site; older browsers send none


def refuse_other_sites(request: Request) -> None:
    """Refuse what a browser sends for another site. Programs send no origin and are let through.

    Raises Forbidden.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    if origin is None and site in _OWN_SITES:
        return
    if site in _OWN_SITES and origin is not None and _is_own(origin, request.headers["host"]):
        return
    raise Forbidden("A page of another site may not do this. Call it from a program.")


def _is_own(origin: str, host: str) -> bool:
    try:
        page = urlsplit(origin)
        name = page.hostname or ""
    except ValueError:  # no address in its brackets
        return False
    return page.netloc.lower() == host.lower() and _cannot_be_rebound(name)


def _cannot_be_rebound(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

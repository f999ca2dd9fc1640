"""Requests to the Hugging Face hub. An answer counts only if it is exactly what was asked for; all else is asked again.

A proxy can answer with status 200 and a page of its own, or ignore a range. Such an answer must not pass for a file's content.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urljoin, urlsplit

from lime_dist.errors import LimeError

ATTEMPTS = 7  # the pauses between them add up to a minute
LONGEST_WAIT = 900.0  # seconds for a rate limit; the hub's windows last 300
TIMEOUT = 60.0  # seconds without a byte
BUFFER = 1 << 20  # bytes that a read fetches at least
TRANSIENT = (408, 425, 500, 502, 503, 504)
_RESET = re.compile(r"\bt=(\d+)")


class HubError(Exception):
    """The hub cannot be read. The message is one line that says what to do."""


class Missing(HubError):
    """There is no such dataset, revision or file."""


class _Passing(Exception):
    """An answer that another attempt may replace."""


@dataclass(frozen=True)
class Answer:
    """The content of an answer, with its headers, and the address at which it was in the end."""

    body: bytes
    headers: Mapping[str, str]
    address: str


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Leave redirects to `_ask`: the token must not reach another host."""


_opener = urllib.request.build_opener(_NoRedirect)


def endpoint() -> str:
    """The hub's address, HF_ENDPOINT or its own."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@dataclass(frozen=True)
class Range:
    """Bytes [first, end) of a file of ``size`` bytes."""

    first: int
    end: int
    size: int

    def __str__(self) -> str:
        return f"bytes {self.first}-{self.end - 1}/{self.size}"


def get(
    url: str, part: Range | None = None, known: str | None = None, check: Callable[[bytes], object] | None = None
) -> Answer:
    """Get what lies at an address, or a part of it.

    Args:
        known: where an earlier answer for this address was found, which is tried first.
        check: raises a ValueError for a content that cannot be the right one.

    Raises:
        HubError: it is not there, needs a token, or cannot be had in several attempts.
    """
    attempt, waited = 1, 0.0
    while True:
        try:
            answer = _ask(url, known or url, part)
            if check is not None:
                check(answer.body)
            return answer
        except (_Passing, ValueError) as error:
            known = None
            reason, pause = str(error), 2.0 ** (attempt - 1)
            if attempt == ATTEMPTS:
                raise HubError(
                    f"{_short(url)}: {reason}, {ATTEMPTS} times; try again when the network is better"
                ) from None
            attempt += 1
        except _Limited as error:
            pause = error.seconds
            waited += pause
            if waited > LONGEST_WAIT:
                raise HubError(
                    f"{_short(url)}: the hub's rate limit is used up; set HF_TOKEN for a higher one"
                ) from None
            print(f"hub: the rate limit is used up; waiting {pause:.0f} s for its reset", file=sys.stderr, flush=True)
        time.sleep(pause)


class _Limited(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def _ask(url: str, asked: str, part: Range | None) -> Answer:
    ranged = {} if part is None else {"Range": f"bytes={part.first}-{part.end - 1}"}
    for _ in range(5):
        token = _token() if urlsplit(asked).netloc == urlsplit(endpoint()).netloc else None
        headers = {"User-Agent": "lime_dist", **ranged, **({"Authorization": f"Bearer {token}"} if token else {})}
        try:
            with _opener.open(urllib.request.Request(asked, headers=headers), timeout=TIMEOUT) as answer:
                status, given, body = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            status, given, body = error.code, error.headers, b""
            if status in (301, 302, 303, 307, 308) and given.get("Location"):
                asked = urljoin(asked, given["Location"])
                continue
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(str(getattr(error, "reason", "") or error) or type(error).__name__) from None
        _check(url, asked, status, given, body)
        if part is not None:
            got = given.get("Content-Range") or "no range"
            if status != 206 or got != str(part) or len(body) != part.end - part.first:
                raise _Passing(f"asked for {part}, got status {status}, {got} and {len(body)} bytes")
        elif status != 200:
            raise _Passing(f"status {status}")
        return Answer(body, dict(given.items()), asked)
    raise HubError(f"{_short(url)}: redirects without end")


def _check(url: str, asked: str, status: int, headers: Message, body: bytes) -> None:
    code = headers.get("X-Error-Code") or ""
    if status == 429:
        reset = headers.get("Retry-After") or (_RESET.search(headers.get("RateLimit") or "") or ["", ""])[1]
        raise _Limited(float(reset) + 1 if str(reset).isdigit() else 60.0)
    if status in TRANSIENT or (asked != url and status in (400, 403, 410)):  # a signed address that has expired
        raise _Passing(f"status {status}")
    if status in (401, 403):
        raise HubError(
            f"{_short(url)}: {code or f'status {status}'}; there is no such dataset, or it needs a token with access: set HF_TOKEN"
        )
    if status == 404:
        raise Missing(f"{_short(url)}: {code or 'not found'}")
    if status >= 400:
        raise HubError(f"{_short(url)}: status {status} {code}".rstrip())


def _token() -> str | None:
    import huggingface_hub

    token = huggingface_hub.get_token()
    return None if token is None else str(token)


def _short(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


class HubFile(io.RawIOBase):
    """The bytes of a file, fetched range by range; every range is checked to be the one asked for.

    Raises:
        LimeError: while reading, if a range cannot be had.
    """

    def __init__(self, address: str, size: int) -> None:
        super().__init__()
        self._address, self._size, self._place = address, size, 0
        self._known: str | None = None  # a signed address of the content

    @classmethod
    def open(cls, address: str, size: int) -> io.BufferedReader:
        """A seekable, buffered stream of a file."""
        return io.BufferedReader(cls(address, size), BUFFER)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._place + len(buffer))
        if self._place >= end:
            return 0
        try:
            answer = get(self._address, Range(self._place, end, self._size), self._known)
        except HubError as error:
            raise LimeError(f"{error}; finished shards are kept, run the same command again") from None
        self._known = answer.address
        buffer[: len(answer.body)] = answer.body
        self._place = end
        return len(answer.body)

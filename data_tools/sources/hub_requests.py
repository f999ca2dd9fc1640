"""Requests to the Hugging Face hub. An answer counts only if it is exactly what was asked for; all else is asked again.

A proxy can answer with status 200 and a page of its own, or ignore a range. Such an answer must not pass for a file's content.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import httpx2

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


class _Limited(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def _patiently(url: httpx2.URL, ask: Callable[[int], httpx2.Response]) -> httpx2.Response:
    """Call ``ask`` with the number of the attempt, until it raises neither a ValueError nor an error of the network.

    Raises:
        HubError: that is so in all attempts, or the rate limit stays used up.
    """
    what, attempt, waited = url.path.lstrip("/"), 1, 0.0
    while True:
        try:
            return ask(attempt)
        except (ValueError, httpx2.HTTPError) as error:
            reason, pause = str(error) or type(error).__name__, 2.0 ** (attempt - 1)
            if attempt == ATTEMPTS:
                raise HubError(f"{what}: {reason}, {ATTEMPTS} times; try again when the network is better") from None
            attempt += 1
        except _Limited as error:
            pause = error.seconds
            waited += pause
            if waited > LONGEST_WAIT:
                raise HubError(f"{what}: the hub's rate limit is used up; set HF_TOKEN for a higher one") from None
            print(f"hub: the rate limit is used up; waiting {pause:.0f} s for its reset", file=sys.stderr, flush=True)
        time.sleep(pause)


class PatientClient(httpx2.Client):
    """The client that `huggingface_hub` and `datasets` use: their requests are asked again here, not there."""

    def __init__(self) -> None:
        super().__init__(follow_redirects=True, timeout=TIMEOUT)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request until it is answered."""

        def ask(_: int) -> httpx2.Response:
            answer = self.send_once(request, **options)
            path = request.url.path
            try:
                if path.startswith("/api/") and answer.status_code == 200 and not options.get("stream"):
                    answer.json()
                if "/resolve/" in path and answer.status_code == 200 and "X-Repo-Commit" not in answer.headers:
                    raise ValueError("the answer is not the hub's")
            except ValueError:
                answer.close()
                raise
            return answer

        return _patiently(request.url, ask)

    def send_once(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request.

        Raises:
            HubError: there is no such dataset or revision, or it needs a token.
        """
        answer = super().send(request, **options)
        try:
            _check(answer)
        except Exception:
            answer.close()
            raise
        return answer


def use_patient_client() -> None:
    """Make `huggingface_hub` and `datasets` use a `PatientClient` in this process."""
    import huggingface_hub

    if not isinstance(huggingface_hub.get_session(), PatientClient):
        huggingface_hub.set_client_factory(PatientClient)


def _check(answer: httpx2.Response) -> None:
    status, what, code = answer.status_code, answer.request.url.path.lstrip("/"), answer.headers.get("X-Error-Code", "")
    if status == 429:
        reset = answer.headers.get("Retry-After") or (_RESET.search(answer.headers.get("RateLimit", "")) or ["", ""])[1]
        raise _Limited(float(reset) + 1 if reset.isdigit() else 60.0)
    if status in TRANSIENT or (
        status in (400, 403, 410) and not _is_hub(answer.url)
    ):  # a signed address that has expired
        raise ValueError(f"status {status}")
    if status in (401, 403):
        raise HubError(
            f"{what}: {code or f'status {status}'}; there is no such dataset, or it needs a token with access: set HF_TOKEN"
        )
    if status == 404 and code in ("RepoNotFound", "RevisionNotFound"):
        raise Missing(f"{what}: {code}")


def _is_hub(url: httpx2.URL) -> bool:
    from huggingface_hub import constants

    return url.netloc == httpx2.URL(constants.ENDPOINT).netloc


def get(
    address: str, check: Callable[[httpx2.Response], None], part: str | None = None, known: str | None = None
) -> httpx2.Response:
    """Get the content at an address of the hub.

    Args:
        check: raises a ValueError for an answer that cannot be the right one.
        part: the range to ask for, as the header names it.
        known: where an earlier answer for this address was found, which is tried first.

    Raises:
        HubError: it is not there, needs a token, or cannot be had in several attempts.
    """
    import huggingface_hub

    use_patient_client()
    client = cast(PatientClient, huggingface_hub.get_session())

    def ask(attempt: int) -> httpx2.Response:
        url = httpx2.URL(known if known and attempt == 1 else address)
        headers = {"Accept-Encoding": "identity", **({"Range": part} if part else {})}
        headers |= huggingface_hub.utils.build_hf_headers(library_name="lime_dist") if _is_hub(url) else {}
        answer = client.send_once(client.build_request("GET", url, headers=headers))
        if 400 <= answer.status_code < 500 and answer.status_code != 416:
            raise Missing(
                f"{url.path.lstrip('/')}: {answer.headers.get('X-Error-Code') or f'status {answer.status_code}'}"
            )
        check(answer)
        return answer

    return _patiently(httpx2.URL(address), ask)


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
        wanted = f"bytes {self._place}-{end - 1}/{self._size}"

        def check(answer: httpx2.Response) -> None:
            status, got, size = answer.status_code, answer.headers.get("Content-Range"), len(answer.content)
            if status != 206 or got != wanted or size != end - self._place:
                raise ValueError(f"asked for {wanted}, got status {status}, {got or 'no range'} and {size} bytes")

        try:
            answer = get(self._address, check, f"bytes={self._place}-{end - 1}", self._known)
        except HubError as error:
            raise LimeError(f"{error}; finished shards are kept, run the same command again") from None
        self._known = str(answer.url)
        buffer[: len(answer.content)] = answer.content
        self._place = end
        return len(answer.content)

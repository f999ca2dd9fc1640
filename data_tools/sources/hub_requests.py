"""Requests to the Hugging Face hub. An answer counts only if it is exactly what was asked for; all else is asked again.

A proxy can answer with status 200 and a page of its own, or ignore a range. Such an answer must not pass for a file's content.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import httpx2

ATTEMPTS, CONTENT_ATTEMPTS = 7, 13  # the pauses between them add up to a minute, and to seven
LONGEST_PAUSE = 60.0  # seconds between two attempts
LONGEST_WAIT = 900.0  # seconds for a rate limit; the hub's windows last 300
TRANSIENT = (408, 425, 500, 502, 503, 504)
signed: dict[str, str] = {}
"""Where the content at an address of the hub was found: a signed address, which expires. The parent gives its own to workers."""

_client_lock = threading.Lock()
_RESET = re.compile(r"\bt=(\d+)")


class HubError(Exception):
    """The hub cannot be read. The message is one line that says what to do."""


class Missing(HubError):
    """There is no such dataset, revision or file."""


class _Refused(ValueError):
    """A server of content refuses an address that the hub gave: it has expired."""


class _Expired(Exception):
    """The same of an address that was given earlier, which is no fault."""


class _Limited(Exception):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def time_out() -> float:
    """Seconds without a byte after which a request is made again."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 60)


def _patiently(url: httpx2.URL, ask: Callable[[int], httpx2.Response], attempts: int = ATTEMPTS) -> httpx2.Response:
    """Call ``ask`` with the number of the attempt, until it raises neither a ValueError nor an error of the network.

    Raises:
        HubError: that is so in all attempts, or the rate limit stays used up.
    """
    what, attempt, waited = url.path.lstrip("/"), 1, 0.0
    while True:
        try:
            return ask(attempt)
        except _Expired:
            continue
        except (ValueError, httpx2.HTTPError) as error:
            reason, pause = str(error) or type(error).__name__, min(LONGEST_PAUSE, 2.0 ** (attempt - 1))
            if attempt == attempts:
                raise HubError(f"{what}: {reason}, {attempts} times; try again when the network is better") from None
            if attempt == ATTEMPTS:
                print(f"hub: {what}: {reason}, {attempt} times; still trying", file=sys.stderr, flush=True)
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
        super().__init__(follow_redirects=True, timeout=time_out())

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

    with _client_lock:  # two threads may make a worker's first requests: the second would close the client of the first
        if not isinstance(huggingface_hub.get_session(), PatientClient):
            huggingface_hub.set_client_factory(PatientClient)


def _check(answer: httpx2.Response) -> None:
    status, what, code = answer.status_code, answer.request.url.path.lstrip("/"), answer.headers.get("X-Error-Code", "")
    if status == 429:
        reset = answer.headers.get("Retry-After") or (_RESET.search(answer.headers.get("RateLimit", "")) or ["", ""])[1]
        raise _Limited(float(reset) + 1 if reset.isdigit() else 60.0)
    if status in TRANSIENT:
        raise ValueError(f"status {status}")
    if status in (400, 403, 410) and not _is_hub(answer.url):
        raise _Refused(f"status {status}")
    if status in (401, 403):
        raise HubError(
            f"{what}: {code or f'status {status}'}; there is no such dataset, or it needs a token with access: set HF_TOKEN"
        )
    if status == 404 and code in ("RepoNotFound", "RevisionNotFound"):
        raise Missing(f"{what}: {code}")


def _is_hub(url: httpx2.URL) -> bool:
    from huggingface_hub import constants

    return url.netloc == httpx2.URL(constants.ENDPOINT).netloc


def get(address: str, check: Callable[[httpx2.Response], None], part: str | None = None) -> httpx2.Response:
    """Get the content at an address of the hub.

    Args:
        check: raises a ValueError for an answer that cannot be the right one.
        part: the range to ask for, as the header names it.

    Raises:
        HubError: it is not there, needs a token, or cannot be had in several attempts.
    """
    import huggingface_hub

    use_patient_client()
    client = cast(PatientClient, huggingface_hub.get_session())

    def ask(attempt: int) -> httpx2.Response:
        known = signed.get(address) if attempt == 1 else None
        url = httpx2.URL(known or address)
        headers = {"Accept-Encoding": "identity", **({"Range": part} if part else {})}
        headers |= huggingface_hub.utils.build_hf_headers(library_name="lime_dist") if _is_hub(url) else {}
        try:
            answer = client.send_once(client.build_request("GET", url, headers=headers))
        except _Refused:
            if known is None:
                raise
            if signed.get(address) == known:  # another thread may have a new one
                signed.pop(address, None)
            raise _Expired from None
        if 400 <= answer.status_code < 500 and answer.status_code != 416:
            raise Missing(
                f"{url.path.lstrip('/')}: {answer.headers.get('X-Error-Code') or f'status {answer.status_code}'}"
            )
        check(answer)
        if not _is_hub(answer.url):
            signed[address] = str(answer.url)
        return answer

    return _patiently(httpx2.URL(address), ask, CONTENT_ATTEMPTS)

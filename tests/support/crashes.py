"""What a crash or a power cut can leave behind in a file that grows by lines."""

from __future__ import annotations

TAILS = {
    "half a line": b'{"step": 3, "lo',
    "NUL bytes": b"\0" * 700,
    "NUL bytes and a newline": b"\0" * 9 + b"\n",
    "foreign bytes": bytes(range(128, 256)) + b"\n\xff\xfe\n",
    "half a character": '{"step": 3, "text": "\u20ac"}'.encode()[:-4],
    "another value": b"3\n",
    "brackets without end": b"[" * 100_000 + b"\n",
}
"""By name, bytes at the end of a file whose lines before are whole."""

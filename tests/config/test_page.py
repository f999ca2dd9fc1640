"""Protects docs/configuration.md: it describes every key, and it is what the schema says today."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from lime_dist.config.page import main, make_page, sections

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert printed == make_page()
    assert (ROOT / "docs/configuration.md").read_text() == printed, (
        "run: python -m lime_dist.config.page > docs/configuration.md"
    )


def test_every_key_and_section_has_a_description() -> None:
    bare = [
        f"{name}.{key}"
        for name, section in sections()
        for key, field in section.model_fields.items()
        if not field.description
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert bare == []
    assert [name for name, section in sections() if not section.__doc__] == []


def test_the_page_shows_types_choices_and_defaults() -> None:
    page = make_page()
    for row in (
        "| `precision` | `fp32`, `bf16`, `fp64` | `fp32` |",
        "| `top_p` | number > 0, ≤ 1 or `null` | `null` |",
        "| `betas` | 2 numbers | `[0.9, 0.95]` |",
        "| `weight` | number > 0 | required |",
        "| `chunked` | 2 | – | 8 | 1 | – |",
    ):
        assert row in page
    for heading in ("## `model.lime.history`\n", "## `data.blend[]`\n", "## `train.batch_ramp`\n", "## Top level\n"):
        assert heading in page


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "example:\n  python -m lime_dist.config.page" in capsys.readouterr().out

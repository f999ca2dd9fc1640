"""Protects the conditions of --where: what is written is what is selected, and what cannot be is refused before the first row."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.pretokenize.__main__ import main as pretokenize
from data_tools.sources.documents import check_conditions, documents
from data_tools.sources.filters import Filter
from data_tools.sources.inputs import list_inputs
from data_tools.sources.tally import Tally
from lime_dist.errors import LimeError

ROWS: list[dict[str, Any]] = [
    {
        "lang": "en",
        "score": 4,
        "big": 2**53 + 1,
        "real": 0.5,
        "good": True,
        "meta": {"lang": "en", "n": 1},
        "my col": "a=b",
    },
    {
        "lang": "de",
        "score": 3,
        "big": 2**53,
        "real": 4.0,
        "good": False,
        "meta": {"lang": "it's", "n": 2},
        "my col": " x ",
    },
    {"lang": 'say "hi"', "score": -2, "big": 0, "real": None, "good": True, "meta": None, "my col": "null"},
    {"lang": None, "score": 10, "big": 1, "real": 1e6, "good": None, "meta": {"lang": None, "n": 3}, "my col": "true"},
    {"lang": "", "score": 0, "big": 2, "real": -0.0, "good": True, "meta": {"lang": "é\n\\", "n": 4}, "my col": "7"},
]


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / f"rows.{request.param}"
    listed = [{"text": str(number), **row} for number, row in enumerate(ROWS)]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(listed), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    return path


def selected(path: Path, *conditions: str) -> str:
    """The texts of the rows that satisfy all conditions, in one word; no row may be rejected."""
    files, filters, tally = list_inputs(str(path)), tuple(map(Filter.parse, conditions)), Tally()
    check_conditions(files, filters)
    texts = "".join(text for *_, text in documents(files, "text", tally, filters))
    assert not tally.rejected and tally.filtered == tally.rows - len(texts)
    return texts


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("lang=en", "0"), ("lang==en", "0"), ("lang = en", "0"), ('lang=="en"', "0"), ("lang='en'", "0"),
        ('lang!="de"', "024"), ("lang!=de", "024"), ("lang=null", "3"), ("lang==null", "3"), ("lang!=null", "0124"),
        ("lang=''", "4"), ('lang!=""', "012"), (r'lang="say \"hi\""', "2"), ("lang='say \"hi\"'", "2"), ('lang=say "hi"', "2"),
        ('lang<"en"', "14"), ("lang>=en", "02"),
        ("score==4", "0"), ("score=4", "0"), ("score>=3", "013"), ("score<=-2", "2"), ("score!=4", "1234"), ("score>3.5", "03"),
        ("score=4.0", "0"), ("score<1e1", "0124"), ("score=null", ""), ("score!=null", "01234"),
        ("big=9007199254740993", "0"), ("big==9007199254740992", "1"), ("big>9007199254740992", "0"),
        ("real>0", "013"), ("real=1e6", "3"), ("real=.5", "0"), ("real<inf", "0134"), ("real=null", "2"), ("real==0", "4"),
        ("good=true", "024"), ("good==false", "1"), ("good!=true", "1"), ("good=null", "3"),
        ("meta.lang=en", "0"), ("meta.lang==null", "23"), ("meta.lang='it\\'s'", "1"), ("meta.lang=it's", "1"),
        ('meta.lang="it\'s"', "1"), ('meta.lang="\\u00e9\\n\\\\"', "4"), ("meta.n>1", "134"), ("meta=null", "2"),
        ('"my col"="a=b"', "0"), ("'my col'=' x '", "1"), ("'my col'='null'", "2"), ("'my col'=true", "3"), ("'my col'='7'", "4"),
    ],
)  # fmt: skip
def test_a_condition_selects_what_it_says(rows: Path, condition: str, expected: str) -> None:
    assert selected(rows, condition) == expected
    again = str(Filter.parse(condition))
    assert selected(rows, again) == expected and str(Filter.parse(again)) == again, "its short form means the same"


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("score", "not a condition; give COLUMN>=VALUE"),
        ("score>=", "not a condition"),
        (">=3", "not a condition"),
        ("score=>3", "=> is no comparison; write >="),
        ("score =< 3", "=< is no comparison; write <="),
        ("score<>3", "<> is no comparison; write !="),
        ("score===3", "=== is no comparison; write =="),
        ("lang~=en", "~= is no comparison; write one of >=, <=, !=, >, <, =, =="),
        ('lang="en', "is not a text in quotation marks"),
        ("lang='it's'", "is not a text in quotation marks"),
        ('lang="a" or lang="b"', "is not a text in quotation marks"),
        ("score>3 and score<5", "holds a comparison; give each condition its own --where"),
        ("score>=null", "null is not larger or smaller than anything"),
        ("good<true", "true is not larger or smaller than anything"),
    ],
)
def test_what_is_no_condition_is_refused(condition: str, says: str) -> None:
    with pytest.raises(LimeError) as refused:
        Filter.parse(condition)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("score=en", "; give a number (rows."),
        ("score='4'", "; give a number, without quotation marks"),
        ("score>=x", "; give a number"),
        ("real=true", "; give a number"),
        ("lang=4", "; write lang='4' to compare it with a text"),
        ("lang>=4.5", "; write lang>='4.5' to compare it with a text"),
        ("good=yes", "; give true or false"),
        ("good=1", "; give true or false"),
        ("meta.n=x", "; give a number"),
        ("meta=1", "can be compared with null only"),
    ],
)
def test_a_value_of_another_type_is_refused_before_the_first_row(rows: Path, condition: str, says: str) -> None:
    with pytest.raises(LimeError) as refused:
        selected(rows, condition)
    assert says in str(refused.value) and f"--where: column {Filter.parse(condition).column!r} holds " in str(
        refused.value
    )


def test_other_types_of_parquet_columns(tmp_path: Path) -> None:
    """Dates compare with dates, decimals with numbers; a column of nulls, or a field of one, is null in every row."""
    zone = timezone(timedelta(hours=2))
    table = pa.table(
        {
            "text": ["0", "1"],
            "day": [date(2024, 1, 31), date(2024, 2, 1)],
            "time": pa.array([1706745599999999999, 1706745600000000000], pa.timestamp("ns")),
            "zoned": pa.array([datetime(2024, 1, 31, 23, tzinfo=zone), datetime(2024, 2, 1, 2, tzinfo=zone)]),
            "price": [Decimal("1.10"), Decimal("2.00")],
            "kind": pa.array(["a", "b"]).dictionary_encode(),
            "none": pa.nulls(2),
            "list": [[1], [2]],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for condition, expected in [
        ("day>=2024-02-01", "1"), ("day='2024-01-31'", "0"), ("time<2024-02-01", "0"), ("time>='2024-02-01T00:00:00'", "1"),
        ("zoned<2024-02-01", "0"), ("price>1.5", "1"), ("price=2", "1"), ("kind=b", "1"), ("none=null", "01"), ("none!=null", ""),
        ("none=x", ""), ("none.deep=null", "01"), ("none.deep>3", ""), ("list!=null", "01"),
    ]:  # fmt: skip
        assert selected(tmp_path, condition) == expected, condition
    for condition, says in [
        ("day>=tomorrow", "give a date such as 2024-12-31"),
        ("day>3", "give a date"),
        ("list=1", "null only"),
    ]:
        with pytest.raises(LimeError, match=says):
            selected(tmp_path, condition)


def test_mixed_values_of_a_jsonl_column_cost_only_their_rows(tmp_path: Path) -> None:
    values = ["en", 7, None, "en"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(v), "lang": v}) + "\n" for v in values))
    files, filters, tally = list_inputs(str(tmp_path)), (Filter.parse("lang==en"), Filter.parse("lang!='7'")), Tally()
    check_conditions(files, filters)
    assert [text for *_, text in documents(files, "text", tally, filters)] == ["en", "en"]
    assert [str(one) for one in tally.rejected] == [
        "a.jsonl row 2: column 'lang' holds int, which lang=en cannot be compared with"
    ]
    assert tally.dropped == {"lang=en": 1, 'lang!="7"': 1}


def test_the_summary_says_how_many_rows_each_condition_dropped(
    rows: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*conditions: str) -> str:
        options = [word for condition in conditions for word in ("--where", condition)]
        pretokenize(
            ["--input", str(rows), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out"), "--workers", "1", *options]
        )  # fmt: skip
        return capsys.readouterr().out

    said = run("score >= 3", 'lang!="en"', "meta.n<9", "score>=3")
    assert (
        "--where score>=3: dropped 2 of 5 rows\n--where lang!=en: dropped 2 of 5 rows\n--where meta.n<9: dropped 1 of 5 rows"
        in said
    )
    assert said.count("dropped") == 3
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (
        description["dropped"] == {"score>=3": 2, "lang!=en": 2, "meta.n<9": 1}
        and description["counts"]["filtered"] == 4
    )
    with pytest.raises(
        LimeError, match="5 of 5 rows do not satisfy --where.*; --where score>99 drops 5; --where big>=0 drops 0;"
    ):
        pretokenize(
            ["--input", str(rows), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "none"), "--workers", "1",
             "--where", "score>99", "--where", "big>=0"]
        )  # fmt: skip
    (tmp_path / "out" / "dataset.json").unlink()
    (tmp_path / "out" / "units.ndjson").unlink()
    assert "warning: --where big>=0 dropped no row" in run("big>=0")

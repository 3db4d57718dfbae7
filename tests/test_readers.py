"""Files of rows: a line is a row, is counted in a note, or is an error that names it; and each row knows its line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import pandas as pd
import pytest
from hypothesis import strategies as st

from harness.data.readers import ENDINGS, ReadRows, counted_rows, place, read_rows


def read(tmp_path: Path, name: str, content: str | bytes, **settings: Any) -> ReadRows:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(path, **settings)


def refused(tmp_path: Path, name: str, content: str | bytes, **settings: Any) -> str:
    with pytest.raises(ValueError) as raised:
        read(tmp_path, name, content, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rows_of(found: ReadRows) -> list[tuple[Any, ...]]:
    return list(found.table.itertuples(index=False, name=None))


# ---------------------------------------------------------------- tab-separated values


def test_a_quotation_mark_in_a_tsv_file_swallows_no_line(tmp_path: Path) -> None:
    lines = [f'"he said {n}\tgood' if n % 5 == 0 else f'so it is {n}"\tbad' for n in range(100)]
    found = read(tmp_path, "rows.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    assert rows_of(found) == [tuple(line.split("\t")) for line in lines]
    assert found.table.index.tolist() == list(range(2, 102))
    assert found.notes == [
        "rows.tsv: in 20 rows (rows.tsv line 2, 7, 12, 17, 22, ...) a field begins with a quotation mark, which is "
        "kept as text, because the file does not quote its fields throughout."
    ]


AWKWARD = ['she said "no"', "a\tb", "two\nlines", '"quoted"', "plain", "", "größer 😀", '"', "5"]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_what_pandas_writes_is_read_as_it_was(tmp_path: Path, ending: str, quoting: Any) -> None:
    rows = pd.DataFrame({"text": AWKWARD, "label": [f"l{n}" for n in range(len(AWKWARD))]})
    rows.to_csv(tmp_path / f"a{ending}", index=False, quoting=quoting, sep="\t" if ending == ".tsv" else ",")
    found = read_rows(tmp_path / f"a{ending}")
    assert rows_of(found) == list(rows.itertuples(index=False, name=None))
    assert found.table.index.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert (
        len(found.notes) == 1 and "1 rows go over several lines, inside quotation marks (line 4 to 5)" in found.notes[0]
    )


def test_a_column_that_is_quoted_throughout_is_quoted(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.tsv", 'text\tn\tlabel\n"one"\t1\tgood\n"two"\t2\tbad\n')
    assert rows_of(found) == [("one", "1", "good"), ("two", "2", "bad")]
    found = read(tmp_path, "rows.tsv", 'text\tn\tlabel\n"one"\t1\tgood\ntwo\t2\tbad\n')
    assert rows_of(found) == [('"one"', "1", "good"), ("two", "2", "bad")]
    assert "in 1 rows (rows.tsv line 2) a field begins with a quotation mark" in found.notes[0]


def test_a_tsv_row_of_another_length_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "rows.tsv", 'text\tlabel\n"fine\ta\nshort\n\nx\ty\tz\n')
    assert message == (
        "2 rows do not have the 2 columns text, label: line 3 has 1, line 5 has 3; fields are what stands between "
        "tabs. The first begins with 'short'"
    )


# ---------------------------------------------------------------- comma-separated values


def test_a_quotation_mark_that_nothing_closes_is_named_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, "rows.csv", 'text,label\nfine,a\n"open,b\nmore,a\n')
    assert message.startswith("line 3: a quotation mark opens a field that nothing closes before the file ends")
    message = refused(tmp_path, "rows.csv", 'text,label\nfine,a\n"open,b\nmore,a\n"other",b\n')
    assert message.startswith("line 3 to 5: ',' expected after '\"'; a field that holds quotation marks is quoted")
    message = refused(tmp_path, "rows.csv", 'text,label\n"no" he said,b\n')
    assert message.startswith("line 2: ',' expected after '\"'")


def test_rows_over_several_lines_are_counted_and_suspected_where_each_line_is_a_row(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.csv", 'text,label\n"a\nb\nc",x\n"open,b\nmore,a\nshut",b\n\n\n')
    assert rows_of(found) == [("a\nb\nc", "x"), ("open,b\nmore,a\nshut", "b")]
    assert found.table.index.tolist() == [2, 5]
    assert found.notes == [
        "rows.csv: 2 rows go over several lines, inside quotation marks (line 2 to 4, ...).",
        "rows.csv: in 1 of these rows every line has as many fields as a row (line 5 to 7); see whether a quotation "
        "mark is missing there.",
    ]


def test_short_and_long_rows_of_a_csv_file_are_errors(tmp_path: Path) -> None:
    for line, count in (("also fine", 1), ("x,b,c", 3), ("x,b,", 3)):
        message = refused(tmp_path, "rows.csv", f"text,label\nfine,a\n{line}\n")
        assert (
            f"1 rows do not have the 2 columns text, label: line 3 has {count}; a field that holds a comma" in message
        )


def test_a_name_that_heads_two_columns_is_an_error(tmp_path: Path) -> None:
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        content = "text,text,label\na,b,c\n".replace(",", separator)
        assert refused(tmp_path, name, content) == "the header names 'text' more than once; rename one of them"
    assert list(read(tmp_path, "rows.csv", ",text,label\n0,a,b\n").table.columns) == ["Unnamed: 0", "text", "label"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.tab", "rows.jsonl", "rows.txt"])
def test_blank_lines_between_rows_are_counted(tmp_path: Path, name: str) -> None:
    rows = ["a", "b"] if name == "rows.txt" else ["a,b", "c,d"]
    rows = [json.dumps({"text": row}) for row in rows] if name == "rows.jsonl" else rows
    head = {"rows.csv": ["text,label"], "rows.tsv": ["text,label"], "rows.tab": ["text,label", "s,d", ""]}.get(name, [])
    lines = [line.replace(",", "\t") if name[-3:] in ("tsv", "tab") else line for line in [*head, *rows]]
    lines.insert(len(head) + 1, " \n")  # two lines
    found = read(tmp_path, name, "\n".join(lines) + "\n\n \n")
    first = len(head) + 1
    assert found.table.index.tolist() == [first, first + 3]
    assert found.notes == [f"{name}: 2 blank lines are skipped (line {first + 1}, {first + 2})."]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.tab", "rows.txt"])
def test_every_line_end(tmp_path: Path, name: str, end: str) -> None:
    separator = "," if name == "rows.csv" else "\t"
    lines = ["text,label", "s,d", ",", "ä\0b,x", "c #,y"] if name == "rows.tab" else ["text,label", "ä\0b,x", "c #,y"]
    found = read(tmp_path, name, b"\xef\xbb\xbf" + end.join(lines).replace(",", separator).encode())
    if name == "rows.txt":
        assert rows_of(found) == [("text\tlabel",), ("ä\0b\tx",), ("c #\ty",)]
    else:
        assert rows_of(found) == [("ä\0b", "x"), ("c #", "y")]


def test_a_carriage_return_inside_a_line_is_text(tmp_path: Path) -> None:
    assert rows_of(read(tmp_path, "rows.tsv", "text\tlabel\na\rb\tx\n")) == [("a\rb", "x")]
    assert rows_of(read(tmp_path, "rows.txt", "a\rb\nc\n")) == [("a\rb",), ("c",)]
    assert refused(tmp_path, "rows.csv", "text\na\rb\n").startswith("line 2: new-line character seen in unquoted field")


def test_a_very_long_field(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "x" * 1_000_000
    assert rows_of(read(tmp_path, "rows.csv", f'text,label\n"{text}",a\n')) == [(text, "a")]
    assert csv.field_size_limit() == limit


def test_lines_with_too_many_parts_are_named(tmp_path: Path) -> None:
    settings = {"line_separator": "||", "line_columns": ["q", "a"]}
    message = refused(tmp_path, "rows.txt", "a||b\n\nc||d||e\n", **settings)
    assert message.startswith("1 rows do not have the 2 columns q, a: line 3 has 3; they are what stands between '||'")


@hypothesis.given(
    text=st.text(st.sampled_from("ab\"'\t,\n\r {}[]:\\\0\ufeff\u2028é"), max_size=60), ending=st.sampled_from(ENDINGS)
)
def test_any_text_is_rows_or_one_message(tmp_path_factory: pytest.TempPathFactory, text: str, ending: str) -> None:
    """And what is no quoting or nesting gives a row for each line that is not blank."""
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(text.encode())
    try:
        found = read_rows(path)
    except ValueError as error:
        assert "\n" not in str(error).replace(text, "")
        return
    numbers = found.table.index.tolist()
    assert numbers == sorted(set(numbers)) or ending in (".json", ".jsonl")
    if ending in (".tsv", ".tab", ".txt") and not any("several lines" in note for note in found.notes):
        head = {".tsv": 1, ".tab": 3, ".txt": 0}[ending]
        lines = text.removeprefix("\ufeff").split("\n" if "\n" in text else "\r")
        blank = sum(int(re.search(r": (\d+) blank", note)[1]) for note in found.notes if "blank lines" in note)  # type: ignore[index]
        assert len(numbers) + blank <= len(lines)
        assert numbers == [n for n, line in enumerate(lines, 1) if line.strip() and n > head] or ending == ".tsv"


# ---------------------------------------------------------------- JSON


ROWS = [{"text": "a", "label": 1}, {"text": "b\u2028c", "label": 0}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (json.dumps(ROWS), [1, 1]),
        ("\n" + json.dumps(ROWS, indent=1) + "\n\n", [3, 7]),
        ("\n\n".join(json.dumps(row) for row in ROWS), [1, 3]),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), [1, 5]),
        ("[]", []),
    ],
    ids=["array", "indented array", "lines", "indented objects", "empty array"],
)
def test_objects_in_lines_and_arrays(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    found = read(tmp_path, name, content)
    assert rows_of(found) == [tuple(row.values()) for row in ROWS[: len(lines)]]
    assert found.table.index.tolist() == lines
    assert not lines or place(found.table.index, 1) == f"{name} line {lines[1]}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"}\n', "line 3: after an object of the array, ',' or ']' is expected"),
        ('[{"text": "a"},\n {"text": b}]', 'line 2: Expecting value at character 11:  {"text": b}]'),
        ('[{"text": "a"},]', "line 1: Expecting value"),
        (
            '[{"text": "a"}]\n[{"text": "b"}]',
            'line 2: something follows the array that holds the rows: [{"text": "b"}]',
        ),
        ('[{"text": "a"}, ["b"]]', 'line 1 is no JSON object; a row is one object, and here stands ["b"]'),
        ('{"text": "a"}\n"b"\n', 'line 2 is no JSON object; a row is one object, and here stands "b"'),
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: an object names 'text' more than once"),
        ('[{"text": "a"},\n{"text": "b", "text": "c"}]', "line 2: an object names 'text' more than once"),
        ('{\n "text": "a"\n}\n{\n "text": b\n}', 'line 5: Expecting value at character 10:  "text": b'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_cannot_be_rows_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    assert refused(tmp_path, "rows.json", content).startswith(message)


def test_a_number_beside_a_missing_one_stays_what_it_is(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.jsonl", '{"label": 1}\n{"text": "a"}\n{"label": null}\n{"label": 2.5}\n')
    assert [repr(value) for value in found.table["label"]] == ["1", "nan", "None", "2.5"]
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"label": pd.array([1, None], dtype="Int64"), "text": ["a", "b"]}).set_index("text").to_parquet(path)
    table = read_rows(path).table
    assert repr(table["label"].iloc[0]) == "1" and table["text"].tolist() == ["a", "b"]
    assert counted_rows(table.index) == "2 rows (rows.parquet row index 0, 1)"

"""SQL against a schema: what exists is accepted in all its forms, what does not is refused at its first wrong byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.decoding.constraints import ConstraintError, Sql, Vocabulary, read_schemas

SCHEMA = {
    "singer": ["Singer_ID", "Name", "Country", "Age"],
    "concert": ["concert_ID", "Year", "Stadium_ID", "order"],
    "singer_in_concert": ["concert_ID", "Singer_ID"],
    "sales (2014)": ["Total $", "is/was"],
}


@pytest.fixture(scope="module")
def sql(letters: Vocabulary) -> Sql:
    return Sql(SCHEMA, letters)


def refused(sql: Sql, query: str) -> str | None:
    """What was read of a query before it was refused; None if it was accepted."""
    state = sql.start()
    for rank, byte in enumerate(query.encode()):
        after = sql.advance(state, byte)
        if after is None:
            return query.encode()[:rank].decode()
        state = after
    return None if sql.may_end(state) else query


GOOD = [
    "SELECT count(*) FROM singer",
    "select NAME ,  age from SINGER order by Age desc limit 3;",
    "SELECT DISTINCT T1.Name FROM singer AS T1 JOIN singer_in_concert AS T2 ON T1.Singer_ID  =  T2.Singer_ID",
    "SELECT s.name FROM singer s INNER JOIN singer_in_concert c ON s.singer_id=c.singer_id AND s.age > 3",
    "SELECT singer.name FROM singer LEFT JOIN singer_in_concert USING (Singer_ID) WHERE concert_id IS NULL",
    "SELECT Country, count(DISTINCT Name) FROM singer GROUP BY Country HAVING count(*) >= 2 AND max(age) < 50",
    "SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer) AND country NOT IN ('US', \"UK\")",
    "SELECT name FROM singer EXCEPT SELECT name FROM singer WHERE age = 3 UNION ALL SELECT 'x' FROM singer",
    "SELECT name FROM singer WHERE age NOT BETWEEN 20 AND 30",
    "SELECT count(*) FROM (SELECT country FROM singer GROUP BY country)",
    "SELECT name FROM singer WHERE name LIKE '%it''s%' OR NOT (age = 3 OR age != -4.5)",
    "SELECT CASE WHEN age > 3 THEN 'old' ELSE 'young' END FROM singer",
    "SELECT max(age) - min(age), round(avg(age) * 2, 1), cast(age AS REAL) FROM singer",
    'SELECT "order" FROM concert ORDER BY [order], `order`',
    'SELECT "Total $" FROM "sales (2014)" WHERE "is/was" = 1',
    "SELECT T1.* FROM concert AS T1 WHERE EXISTS (SELECT * FROM singer_in_concert WHERE concert_id = T1.concert_id)",
    "SELECT 1 FROM singer, concert\nWHERE year = 2014",
]


@pytest.mark.parametrize("query", GOOD)
def test_accepted(query: str, sql: Sql) -> None:
    assert refused(sql, query) is None


@pytest.mark.parametrize(
    ("query", "read"),
    [
        ("SELECT nome FROM singer", "SELECT n"),
        ("SELECT name FROM singers", "SELECT name FROM singer"),
        ("SELECT singer.year FROM singer", "SELECT singer."),
        ("SELECT T1.total FROM singer AS T1", "SELECT T1."),
        ("SELECT order FROM concert", "SELECT o"),
        ("SELECTname FROM singer", "SELECT"),
        ("SELECT sum(*) FROM singer", "SELECT sum("),
        ("SELECT name singer", "SELECT name "),
        ("DROP TABLE singer", ""),
        ("SELECT name FROM singer; DROP TABLE singer", "SELECT name FROM singer; "),
    ],
)
def test_refused_at_the_first_wrong_byte(query: str, read: str, sql: Sql) -> None:
    assert refused(sql, query) == read


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT year FROM singer", "no such column: year"),
        ("SELECT T2.name FROM singer AS T1", "no such column: T2.name"),
        ("SELECT concert_id FROM concert JOIN singer_in_concert", "ambiguous column name: concert_id"),
        ("SELECT name FROM singer WHERE count(*) > 3", "misuse of aggregate"),
        (
            "SELECT name FROM singer UNION SELECT name, age FROM singer",
            "do not have the same number of result columns",
        ),
    ],
)
def test_may_not_end_where_sqlite_refuses(query: str, reason: str, sql: Sql) -> None:
    """The grammar takes it whole; SQLite says why it may not end there."""
    assert refused(sql, query) == query
    assert reason in (sql.refusal(query) or "")


def test_a_column_of_no_table_yet_may_come_by_a_join(sql: Sql) -> None:
    assert refused(sql, "SELECT name, year FROM singer") == "SELECT name, year FROM singer"
    assert refused(sql, "SELECT name, year FROM singer JOIN concert") is None


def test_spider_form_and_plain_form(letters: Vocabulary, tmp_path: Path) -> None:
    spider = {
        "db_id": "pets",
        "table_names_original": ["Pets", "sqlite_sequence"],
        "column_names_original": [[-1, "*"], [0, "PetID"], [0, "weight"], [1, "name"]],
    }
    (tmp_path / "many.jsonl").write_text(json.dumps(spider) + "\n")
    assert read_schemas(tmp_path / "many.jsonl") == {"pets": {"Pets": ["PetID", "weight"]}}
    (tmp_path / "list.json").write_text(json.dumps([spider]))
    assert read_schemas(tmp_path / "list.json").keys() == {"pets"}
    (tmp_path / "plain.json").write_text(json.dumps(SCHEMA))
    assert read_schemas(tmp_path / "plain.json") == {"": SCHEMA}


def test_bad_schemas(letters: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ConstraintError, match="the schema has no tables"):
        Sql({}, letters)
    with pytest.raises(ConstraintError, match="table 'a' has no columns"):
        Sql({"a": []}, letters)
    with pytest.raises(ConstraintError, match="table 'a': duplicate column name: X"):
        Sql({"a": ["x", "X"]}, letters)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConstraintError, match=r"bad\.json: not JSON: Expecting property name"):
        read_schemas(tmp_path / "bad.json")

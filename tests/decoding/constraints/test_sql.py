"""SQL against a schema: what exists is accepted in all its forms, what does not is refused at its first wrong byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from align.decoding.constraints import ConstraintError, Sql, Vocabulary, parse, read_schemas
from align.decoding.constraints.conformance import check

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


def test_a_clause_that_may_not_follow_is_not_begun(sql: Sql) -> None:
    """Byte by byte no text is kept before a clause that closes what is wrong; only a join or a comma may mend it."""
    state = sql.start()
    for byte in b"SELECT year FROM singer ":
        state = sql.advance(state, byte)
    after = {chr(byte).upper() for byte in range(128) if sql.advance(state, byte) is not None}
    assert {",", "J", "L", "N", "A"} <= after  # LEFT, NATURAL and an alias among them
    for word in ("WH", "LI", "OR", "GR", "UN", "EXC", "INT"):
        kept = state
        for byte in word.encode():
            kept = sql.advance(kept, byte) if kept is not None else None
        assert kept is None, word


@pytest.mark.parametrize(
    ("query", "read"),
    [
        ("SELECT year FROM singer WHERE age = 3", "SELECT year FROM singer W"),
        ("SELECT year FROM singer;", "SELECT year FROM singer"),
        ("SELECT 1 FROM singer WHERE max(age) = 3 ORDER BY name", "SELECT 1 FROM singer WHERE max(age) = 3 OR"),
        ("SELECT name FROM singer GROUP BY year LIMIT 3", "SELECT name FROM singer GROUP BY year "),
        ("SELECT 1, 2 FROM singer UNION SELECT 1 FROM singer;", "SELECT 1, 2 FROM singer UNION SELECT 1 FROM singer"),
    ],
)
def test_what_is_closed_is_judged_at_once(query: str, read: str, sql: Sql) -> None:
    """No later clause makes it right: without this a text ran on to the limit and could never end."""
    assert refused(sql, query) == read


def test_what_may_still_be_mended_is_kept(sql: Sql) -> None:
    """Clauses of a sub-query, words within quotes and names that begin as clauses do close nothing."""
    names = Sql({"orders": ["where_id", "order_id"], "lists": ["order_id", "limits"]}, sql.vocabulary)
    joined = (
        "SELECT limits FROM orders JOIN lists ON orders.order_id = lists.order_id AND where_id = 3 WHERE limits = 3"
    )
    assert refused(names, joined) is None
    query = (
        "SELECT ' FROM x WHERE ;', (SELECT max(age) FROM singer WHERE age < concert.year ), \"order\" "
        "FROM concert JOIN singer ON name = \"where ;\" WHERE name = 'a; LIMIT 3' AND year = 2014"
    )
    assert refused(sql, query) is None


def test_walks_where_names_are_of_other_tables_meet_no_dead_end() -> None:
    """Judged at its end alone, one of these walks comes to a WHERE after which nothing may follow."""
    pieces = [b" WHERE", b" ORDER", b"SELECT", b" name", b" FROM", b" flight", b" airport"]
    vocabulary = Vocabulary(
        [*(bytes([byte]) for byte in range(32, 127)), *pieces, None], frozenset({95 + len(pieces)})
    )
    constraint = Sql({"airport": ["name", "code"], "flight": ["id", "no"]}, vocabulary)
    check(constraint, vocabulary, texts=["SELECT name FROM airport"], walks=6, length=40)


def test_the_mask_agrees_where_a_part_is_closed() -> None:
    """Tokens of several letters that close a part are asked about; the others are the grammar's."""
    pieces = [b"SELECT year FROM singer", b" WH", b"ERE", b"ERE ", b" ", b"\n", b";", b", concert", b"; ", b"E", b"x"]
    vocabulary = Vocabulary([*pieces, None], frozenset({len(pieces)}))
    words = Sql(SCHEMA, vocabulary)
    begun = words.advance(words.start(), 0)
    joined = words.advance(begun, 7)
    where = words.advance(joined, 1)
    whole = words.advance(where, 2)
    for state, expected in ((begun, {4, 5, 7}), (joined, {1, 4, 5, 6, 7, 8}), (where, {2, 3, 9}), (whole, {4, 5})):
        allowed = {token for token in range(len(pieces)) if words.advance(state, token) is not None}
        assert allowed == set(words.allowed(state).nonzero()[0]) == expected


def test_the_mask_agrees_where_a_quotation_ends() -> None:
    """A token that ends a text and begins a clause is asked about, too."""
    pieces = [b"SELECT count(*) FROM singer WHERE max(age) = 'a", b"b", b"' OR", b"' O", b"' ORD", b"'", b" O"]
    words = Sql(SCHEMA, Vocabulary([*pieces, None], frozenset({len(pieces)})))
    state = words.advance(words.start(), 0)
    allowed = {token for token in range(len(pieces)) if words.advance(state, token) is not None}
    assert allowed == set(words.allowed(state).nonzero()[0]) == {1, 2, 3, 5, 6}


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


def spider(tables: object, columns: object) -> str:
    return json.dumps({"db_id": "d", "table_names_original": tables, "column_names_original": columns})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ("[]", "there is no schema in it"),
        ("[1]", "schema 1: not a schema: write"),
        ('{"singer": [1, 2]}', "table 'singer': 1 is no name; write text"),
        ('{"singer": [["name", "text"]]}', "table 'singer': ['name', 'text'] is no name"),
        ('{"a": ["x\\ud800"]}', r"table 'a': 'x\ud800' is no name"),
        ('{"a": ["x\\u0000"]}', r"table 'a': 'x\x00' is no name"),
        (spider(["t"], [[0, "c"], [5, "d"]]), "schema 1: column_names_original[1] is [5, 'd']: write [number of the"),
        (spider(["t"], ["x"]), "column_names_original[0] is 'x': write"),
        (spider(["t"], None), "column_names_original[0] is None: write"),
        (spider(None, []), "schema 1: table_names_original is no list of different names"),
        (spider(["t", "t"], []), "table_names_original is no list of different names"),
        (spider(["t", None], [[0, "c"], [1, "d"]]), "table None: None is no name"),
        ('[{"a": ["x"]}, {"b": ["x"]}]', "schema 2: one before it is called '' too"),
    ],
)
def test_bad_files_of_schemas(content: str, message: str, letters: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConstraintError) as caught:
        parse(f"sql:{path}", letters)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_cut_short(tmp_path: Path) -> None:
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"a": ["x"]}')[:-9])
    with pytest.raises(ConstraintError, match=r"cut\.json\.gz: Compressed file ended"):
        read_schemas(tmp_path / "cut.json.gz")

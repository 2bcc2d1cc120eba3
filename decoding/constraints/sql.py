"""A constraint from a database's schema: one SELECT statement of SQLite over its tables and columns.

Two parts. A grammar made from the schema says, token by token, what may follow: keywords, functions, literals, and of
names only tables and columns that exist, ``table.column`` only for the table's own columns. What no context-free
grammar can say is left to SQLite itself, which prepares a statement on an empty database with this schema: that a
column belongs to a table of FROM, that an alias is declared, that a name is not ambiguous. It is asked where a
statement wants to end, and as soon as WHERE, GROUP, ORDER, LIMIT, a set operator or a semicolon closes a part of it,
since what follows cannot mend that part. Within a part a text may be kept that nothing completes (``SELECT name FROM
flights`` where only airports have names can only join): it can go on and never end.

Known: joins of every kind, sub-queries, aggregates, GROUP BY, HAVING, ORDER BY, LIMIT, UNION, INTERSECT, EXCEPT, CASE,
CAST and common functions; keywords and names in any case. Table aliases are a letter and up to two digits (``T1``).
Values in double quotes are text, as SQLite takes them. Names of results (``SELECT count(*) AS n``) are not known.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .compiled import Compiled, grammar
from .protocol import ConstraintError, Vocabulary

Schema = Mapping[str, Sequence[str]]  # table: its columns

GRAMMAR = r"""
start: WS? query WS? (";" WS?)?
query: select (WS ("UNION"i (WS "ALL"i)? | "INTERSECT"i | "EXCEPT"i) WS select)* (WS order)? (WS limit)?
select: "SELECT"i WS ("DISTINCT"i WS)? result (comma result)* WS "FROM"i WS sources (WS where)? (WS group)?
where: "WHERE"i WS condition
group: "GROUP"i WS "BY"i WS expression (comma expression)* (WS "HAVING"i WS condition)?
order: "ORDER"i WS "BY"i WS key (comma key)*
key: expression (WS ("ASC"i | "DESC"i))?
limit: "LIMIT"i WS INTEGER ((WS "OFFSET"i WS | comma) INTEGER)?

result: expression | "*" | qualifier "." "*"
qualifier: TABLE | ALIAS
sources: source (comma source | WS JOIN WS source (WS "ON"i WS condition | WS "USING"i WS? "(" WS? COLUMN WS? ")")?)*
source: (TABLE | "(" WS? query WS? ")") (WS ("AS"i WS)? ALIAS)?

condition: test (WS ("AND"i | "OR"i) WS test)*
test: ("NOT"i WS)? (predicate | "(" WS? condition WS? ")")
predicate: expression WS? COMPARISON WS? expression
    | expression WS ("NOT"i WS)? ("LIKE"i | "GLOB"i) WS expression
    | expression WS ("NOT"i WS)? "BETWEEN"i WS expression WS "AND"i WS expression
    | expression WS ("NOT"i WS)? "IN"i WS? "(" WS? (query | expression (comma expression)*) WS? ")"
    | expression WS "IS"i WS ("NOT"i WS)? "NULL"i
    | "EXISTS"i WS? "(" WS? query WS? ")"

expression: term (WS? OPERATOR WS? term)*
term: column | NUMBER | TEXT | "NULL"i
    | AGGREGATE WS? "(" WS? ("DISTINCT"i WS)? expression WS? ")"
    | "COUNT"i WS? "(" WS? (("DISTINCT"i WS)? expression | "*") WS? ")"
    | FUNCTION WS? "(" WS? expression (comma expression)* WS? ")"
    | "CAST"i WS? "(" WS? expression WS "AS"i WS TYPE WS? ")"
    | "CASE"i (WS "WHEN"i WS condition WS "THEN"i WS expression)+ (WS "ELSE"i WS expression)? WS "END"i
    | "(" WS? (expression | query) WS? ")"
comma: WS? "," WS?

WS: /[ \t\r\n]{1,8}/
JOIN: /(?i:((NATURAL[ ]+)?(INNER|CROSS|LEFT([ ]+OUTER)?)[ ]+|NATURAL[ ]+)?JOIN)/
COMPARISON: /=|==|<>|!=|<|<=|>|>=/
OPERATOR: /[-+*\/%]|\|\|/
AGGREGATE: /(?i:SUM|AVG|MIN|MAX|TOTAL|GROUP_CONCAT)/
FUNCTION: /(?i:ABS|ROUND|LENGTH|LOWER|UPPER|TRIM|SUBSTR|COALESCE|IFNULL|NULLIF|DATE|STRFTIME)/
TYPE: /(?i:INTEGER|INT|REAL|FLOAT|TEXT)/
ALIAS: /[A-Za-z][0-9]{0,2}/
INTEGER: /[0-9]{1,9}/
NUMBER: /-?[0-9]{1,15}(\.[0-9]{1,15})?/
TEXT: /'([^'\n]|'')*'|"([^"\n]|"")*"/
"""

CLAUSES = ("where", "group", "order", "limit", "union", "intersect", "except")
_NAMES = "|".join(CLAUSES)
_PART = re.compile(r"""'[^']*'?|"[^"]*"?|`[^`]*`?|\[[^\]]*\]?|[();]|\w+(?=\s)""")
_OUTSIDE_QUOTES = re.compile(r"""([^'"`\[]|'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\])*""")
_BEGUN = "|".join(sorted({name[:length] for name in CLAUSES for length in range(1, len(name))}, key=len, reverse=True))
# Of tokens: what may close a part by itself; what may begin to; what ends a quotation; what goes on with a word.
_CLOSES = re.compile(rf";|\b({_NAMES})(\s|$)".encode(), re.IGNORECASE)
_BEGINS = re.compile(rf"\b({_BEGUN})$".encode(), re.IGNORECASE)
_QUOTE = re.compile(rb"['\"`\]]")
_GOES_ON = re.compile(rb"\w+(\s|$)|\s")
_MAY_CLOSE = re.compile(rf"[\s;]|[{''.join(sorted(set(''.join(CLAUSES))))}]$".encode(), re.IGNORECASE)


class Sql:
    """The answer is one SELECT statement that SQLite can run on a database with this schema.

    Args:
        schema: the columns of every table.
        vocabulary: the tokens that answers are made of.

    Raises:
        ConstraintError: a schema without tables, a table without columns, or a name given twice.
    """

    def __init__(self, schema: Schema, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._database = _database(schema)
        self._grammar: Compiled = grammar(lark(schema), vocabulary, name="sql")
        self._may_close, self._closes, self._begins, self._goes_on = (
            np.array([found(token or b"") is not None for token in vocabulary.tokens])
            for found in (_MAY_CLOSE.search, _CLOSES.search, _BEGINS.search, _GOES_ON.match)
        )
        quotes = np.array([_QUOTE.search(token or b"") is not None for token in vocabulary.tokens])
        self._closes |= self._begins & quotes

    def start(self) -> Any:
        return self._grammar.start()

    def advance(self, state: Any, token: int) -> Any | None:
        after = self._grammar.advance(state, token)
        if after is None or not self._may_close[token]:
            return after
        closed = self._closed(after)
        new = closed is not None and closed != self._closed(state)
        return None if new and self.refusal(str(closed)) is not None else after

    def _closed(self, state: Any) -> str | None:
        """The part that nothing can mend; a clause closes it as soon as no other word can come of its letters."""
        text = self._grammar.text(state)
        word = re.search(r"\w*$", text)
        begun = word[0].lower() if word is not None else ""
        for name in CLAUSES:
            if begun and name.startswith(begun) and self._must_become(state, name[len(begun) :]):
                return _closed(f"{text}{name[len(begun) :]} ")
        return _closed(text)

    def _must_become(self, state: Any, rest: str) -> bool:
        for place, letter in enumerate(rest):
            said, either = rest[:place].encode(), set(f"{letter}{letter.upper()}".encode())
            others = self._grammar.next_bytes(state, said) - either
            # The grammar takes a long s for an s, too, as regular expressions do.
            if others and (letter, others, self._grammar.next_bytes(state, said + b"\xc5")) != ("s", {0xC5}, {0xBF}):
                return False
        return self._grammar.next_bytes(state, rest.encode()) <= set(b" \t\r\n")

    def may_end(self, state: Any) -> bool:
        return self._grammar.may_end(state) and self.refusal(self._grammar.text(state)) is None

    def allowed(self, state: Any) -> np.ndarray:
        mask, text = self._grammar.allowed(state), self._grammar.text(state)
        asked = self._closes
        if _OUTSIDE_QUOTES.fullmatch(text):
            word = re.search(r"\w*$", text)
            begun = word[0].lower() if word is not None else ""
            asked = asked | self._begins
            if begun and any(name.startswith(begun) for name in CLAUSES):
                asked = asked | self._goes_on
        asked = asked & mask
        for token in np.flatnonzero(asked).tolist():
            mask[token] = self.advance(state, token) is not None
        return mask

    def refusal(self, statement: str) -> str | None:
        """Why SQLite does not prepare a statement, or None. The statement is not run."""
        try:
            self._database.execute(f"EXPLAIN {statement}").close()
        except sqlite3.Error as error:
            return str(error)
        return None


def _closed(text: str) -> str | None:
    """The part of a statement that what follows cannot change: what stands before its last clause or semicolon."""
    depth, has_sources, stop = 0, False, None
    for part in _PART.finditer(text):
        word = part[0].lower()
        depth += (word == "(") - (word == ")")
        has_sources |= not depth and word == "from"
        if not depth and (word == ";" or (has_sources and word in CLAUSES)):
            stop = part.start()
    return None if stop is None else text[:stop]


def lark(schema: Schema) -> str:
    """The grammar of SELECT statements over a schema."""
    columns = sorted({name.lower() for table in schema.values() for name in table})
    rules = [GRAMMAR, f"TABLE: {_one_of(schema)}", f"COLUMN: {_one_of(columns)}"]
    qualified = ['ALIAS "." COLUMN']
    for rank, (table, names) in enumerate(schema.items()):
        rules += [f"TABLE_{rank}: {_one_of([table])}", f"COLUMN_{rank}: {_one_of(names)}"]
        qualified.append(f'TABLE_{rank} "." COLUMN_{rank}')
    return "\n".join([*rules, f"column: COLUMN | {' | '.join(qualified)}", ""])


def read_schemas(path: str | Path) -> dict[str, Schema]:
    """Schemas by name: a JSON file or lines of JSON (also gzipped).

    Each is ``{"table": ["column", ...], ...}`` or Spider's form (``db_id``, ``table_names_original``,
    ``column_names_original``; SQLite's own tables are left out), alone or in a list; a schema without ``db_id`` has
    the name "".

    Raises:
        ConstraintError: the file cannot be read, a schema is of neither form, or two have one name.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        one_a_line = ".jsonl" in path.suffixes
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if one_a_line else json.loads(text)
    except (OSError, EOFError, zlib.error) as error:
        raise ConstraintError(f"sql: {path}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"sql: {path}: not JSON: {error}") from None
    schemas: dict[str, Schema] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        try:
            name, schema = _schema(row)
            if name in schemas:
                raise ValueError(f"one before it is called {name!r} too; give each a db_id of its own")
        except ValueError as error:
            raise ConstraintError(f"sql: {path}: schema {number}: {error}") from None
        schemas[name] = schema
    if not schemas:
        raise ConstraintError(f"sql: {path}: there is no schema in it")
    return schemas


def _schema(row: Any) -> tuple[str, Schema]:
    """Name and tables. ValueError where ``row`` is neither form."""
    if isinstance(row, dict) and {"table_names_original", "column_names_original"} <= row.keys():
        return str(row.get("db_id", "")), _of_spider(row["table_names_original"], row["column_names_original"])
    if isinstance(row, dict) and row and all(isinstance(columns, list) for columns in row.values()):
        return "", row
    raise ValueError('not a schema: write {"table": ["column", ...]}, or Spider\'s form')


def _of_spider(names: Any, columns: Any) -> Schema:
    if not isinstance(names, list) or len({str(name) for name in names}) < len(names):
        raise ValueError("table_names_original is no list of different names")
    tables: list[list[Any]] = [[] for _ in names]
    for place, pair in enumerate(columns if isinstance(columns, list) else [columns]):
        match pair:
            case [int(table), column] if -1 <= table < len(names):
                if table >= 0:
                    tables[table].append(column)
            case _:
                raise ValueError(
                    f"column_names_original[{place}] is {_shown(pair)}: write [number of the table, name]"
                )
    return {name: own for name, own in zip(names, tables, strict=True) if not str(name).startswith("sqlite_")}


def _database(schema: Schema) -> sqlite3.Connection:
    """An empty database with the schema; building it finds what is wrong with the schema."""
    if not schema:
        raise ConstraintError("sql: the schema has no tables: nothing satisfies it")
    database = sqlite3.connect(":memory:", check_same_thread=False)
    for table, columns in schema.items():
        if not columns:
            raise ConstraintError(f"sql: table {table!r} has no columns")
        for name in (table, *columns):
            if not _is_text(name):
                raise ConstraintError(f"sql: table {_shown(table)}: {_shown(name)} is no name; write text")
        try:
            database.execute(f"CREATE TABLE {_quoted(table)} ({', '.join(map(_quoted, columns))})")
        except sqlite3.Error as error:
            raise ConstraintError(f"sql: table {table!r}: {error}") from None
    return database


def _is_text(name: Any) -> bool:
    """Whether SQLite could read a name: text without NUL and without halves of surrogate pairs."""
    return isinstance(name, str) and not re.search("[\0\ud800-\udfff]", name)


def _shown(value: Any) -> str:
    return ascii(value)[:60]


def _one_of(names: Mapping[str, Any] | Sequence[str]) -> str:
    """A terminal for names, in any case: as they are where SQLite reads them so, in quotes where it does not."""
    return f"/(?i:{'|'.join(_pattern(name) for name in names)})/"


def _pattern(name: str) -> str:
    if _plain(name):
        return re.escape(name)
    return "|".join(_escaped(form) for form in (_quoted(name), f"`{name}`", f"[{name}]"))


def _escaped(text: str) -> str:
    return re.sub(r"[^\w ]", lambda found: f"\\x{{{ord(found[0]):X}}}", text)


def _plain(name: str) -> bool:
    """Whether SQLite takes a name without quotes: letters, and no keyword."""
    if re.fullmatch(r"[^\W\d]\w*", name) is None:
        return False
    try:
        sqlite3.connect(":memory:").execute(f"CREATE TABLE {name} ({name})")
    except sqlite3.Error:
        return False
    return True


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

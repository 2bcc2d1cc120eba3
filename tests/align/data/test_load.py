"""Every kind of source gives the same rows; every broken one says what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from align.data.load import read_rows
from align.data.rows import Fault
from align.errors import AlignError

ROWS = [
    {"prompt": "Name a fruit.", "chosen": " An apple, or\n a pear.", "rejected": " Fruit is good."},
    {"prompt": "Größer als 3?", "chosen": " 4", "rejected": " 2"},
]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path) -> str:
    """ROWS in the format that the path's suffix names."""
    data = Dataset.from_list(ROWS)
    if ".jsonl" in path.name:
        text = jsonl(ROWS)
    elif ".json" in path.name:
        text = json.dumps(ROWS)
    elif ".csv" in path.name:
        text = data.to_pandas().to_csv(index=False)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
        return str(path)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def fields(source: str) -> list[Any]:
    return [row for _, _, row in read_rows(source)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name)
    assert list(read_rows(source)) == [(source, 1, ROWS[0]), (source, 2, ROWS[1])]


def test_folder_is_read_in_the_order_of_its_paths_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache" / "old.jsonl").write_text(jsonl([{"prompt": "old"}]))
    first, second = write(tmp_path / "b.parquet"), write(tmp_path / "deep" / "a.jsonl")
    assert [(file, row) for file, row, _ in read_rows(str(tmp_path))] == [
        (first, 1),
        (first, 2),
        (second, 1),
        (second, 2),
    ]


def test_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path)
    assert fields(f"{tmp_path}/train") == ROWS
    with pytest.raises(AlignError, match=f"name one: {tmp_path}/train, {tmp_path}/test"):
        read_rows(str(tmp_path))


def test_line_faults_keep_their_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b'\n\n{"prompt": "x\n\xff\xfe\n[1]\n' + good)
    rows = list(read_rows(str(path)))
    assert [number for _, number, _ in rows] == [1, 3, 4, 5, 6]
    assert rows[0][2] == rows[4][2] == ROWS[0]
    faults = [row for _, _, row in rows if isinstance(row, Fault)]
    assert [fault.reason.split(":")[0] for fault in faults] == [
        "broken JSON",
        "not UTF-8",
        "a list, not an object with named fields",
    ]
    assert faults[0].content == '{"prompt": "x'


def test_csv_faults_keep_their_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen,rejected,strength\n"two\nlines",a,b,0.5\nx,a,b\nx,\xff,b,\nx,a,b,\nx,a,b,much\n')
    rows = [row for _, _, row in read_rows(str(path))]
    assert rows[0] == {"prompt": "two\nlines", "chosen": "a", "rejected": "b", "strength": 0.5}
    assert isinstance(rows[1], Fault)
    assert (rows[1].row, rows[1].reason[:30]) == (2, "3 cells under 4 column names: ")
    assert isinstance(rows[2], Fault)
    assert (rows[2].row, rows[2].reason[:9]) == (3, "not UTF-8")
    assert rows[3] == {"prompt": "x", "chosen": "a", "rejected": "b"}
    assert rows[4]["strength"] == "much"


def test_csv_soft_labels_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,preference\nx,a,b, 0.75 \nx,a,b,\nx,a,b,likely\n")
    rows = [row for _, _, row in read_rows(str(path))]
    assert [row.get("preference") for row in rows if isinstance(row, dict)] == [0.75, None, "likely"]


def test_csv_cell_of_a_long_dialogue(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt\n{'long ' * 40_000}\n")
    assert len(fields(str(path))[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n\n", "empty: it has no rows"),
        ("empty.csv", b"prompt,chosen\n", "empty: it has no rows"),
        ("rows.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "name it .jsonl"),
        ("one.json", b'{"prompt": "a"}', "not a list of rows"),
        ("bytes.json", b'["\xff"]', "not UTF-8: save the file as UTF-8"),
        ("a.txt", b"text", "unknown kind of file: use one of .jsonl"),
        ("a.parquet", b"PAR0", "not a readable Parquet file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ],
)
def test_unusable_file_says_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AlignError, match=message) as caught:
        list(read_rows(str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(AlignError, match="no such file or folder"):
        read_rows(str(tmp_path / "typo.jsonl"))
    with pytest.raises(AlignError, match=r"no data in this folder: looked for \.jsonl"):
        read_rows(str(tmp_path))
    with pytest.raises(AlignError, match="no such data in the package"):
        read_rows("align:nothing/train")


def test_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(AlignError, match=r"nobody/nothing: no file or folder .* check the name and the network"):
        read_rows("nobody/nothing")


def test_packaged_data_that_exists_is_read() -> None:
    with pytest.raises(AlignError) as caught:
        read_rows("align:nothing/train")
    for name in (part for part in str(caught.value).split() if part.startswith("align:") and "nothing" not in part):
        assert next(read_rows(name.rstrip(",")))[1] == 1

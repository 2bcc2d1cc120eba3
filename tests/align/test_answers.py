"""The file of answers: what a second call keeps of it, and what it never touches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.answers import make_place, read_done
from align.errors import AlignError

PROMPTS = {1: "the hat", 2: "é\u2028"}
SETTINGS = {"seed": 0}
ROWS = [{"row": row, "prompt": prompt, "completion": "x", "settings": SETTINGS} for row, prompt in PROMPTS.items()]
WANTED = {row: {"prompt": prompt, "settings": SETTINGS} for row, prompt in PROMPTS.items()}
LINES = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]


@pytest.mark.parametrize("kept", [1, 8, 20, len(LINES[1]) - 2])
def test_a_torn_line_of_ours_is_cut_off(kept: int, tmp_path: Path) -> None:
    """Wherever it was torn, inside the two bytes of é too."""
    output = tmp_path / "out.jsonl"
    for torn in (LINES[1][:kept], LINES[1][: LINES[1].index("é".encode()) + 1]):
        output.write_bytes(LINES[0] + torn)
        assert read_done(output, WANTED) == ({1}, set())
        assert output.read_bytes() == LINES[0]


def test_a_line_that_only_misses_its_end_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(LINES[0] + LINES[1].rstrip(b"\n"))
    assert read_done(output, WANTED) == ({1, 2}, set())
    assert output.read_bytes() == LINES[0] + LINES[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"type": "object"}', 1),
        (b'{"prompt": "the hat"}', 1),
        (b"not JSON", 1),
        (b'{"row": 1, "prompt": "another', 1),
        (LINES[0] + b'{"type": ', 2),
        (LINES[0] + LINES[1].replace(b"0", b"1").rstrip(b"\n"), 2),
        (b"\xff\xfe\n" + LINES[0], 1),
        (b"[" * 100_000 + b"\n", 1),
    ],
    ids=["schema", "prompts", "text", "other prompt", "torn", "other settings", "no UTF-8", "deep"],
)
def test_a_file_that_is_not_ours_is_left_as_it_was(content: bytes, line: int, tmp_path: Path) -> None:
    """Also where it is a single line without an end, which looks like one that a kill has torn."""
    output = tmp_path / "person.json"
    output.write_bytes(content)
    with pytest.raises(AlignError, match=rf"person\.json: line {line} is no answer .*; name another output"):
        read_done(output, WANTED)
    assert output.read_bytes() == content


def test_the_output_is_not_the_input_nor_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'{"prompt": "a"}')
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (source, tmp_path / "link.jsonl"):
        with pytest.raises(AlignError, match="this is what is read"):
            make_place(output, str(source))
    with pytest.raises(AlignError, match="this is what is read"):
        make_place(tmp_path / "out.jsonl", str(tmp_path))
    with pytest.raises(AlignError, match="a folder or a device"):
        make_place(tmp_path, str(source))

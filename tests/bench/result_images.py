"""Plots of a result of ``align eval`` as PNG files, as W&B and the report have them, for pages of docs/results.

python tests/bench/result_images.py frontier.json docs/results/frontier
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.reports.eval_figures import result_pictures


def main() -> None:
    """Write NAME.png, and NAME-2.png and so on where there are several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("name", type=Path, help="path without .png")
    given = parser.parse_args()
    for number, picture in enumerate(result_pictures(json.loads(given.result.read_text(encoding="utf-8"))), start=1):
        path = given.name.with_name(f"{given.name.name}{'' if number == 1 else f'-{number}'}.png")
        path.write_bytes(picture.png())
        print(f"{path}: {picture.title}")


if __name__ == "__main__":
    main()

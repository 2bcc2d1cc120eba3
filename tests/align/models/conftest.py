"""The packaged model, converted once for all tests that want it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.models.packaged import packaged_model


@pytest.fixture(scope="session")
def packaged_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of smollm2-135m-instruct, in a cache that goes when the tests end (0.54 GB)."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        folder = packaged_model("smollm2-135m-instruct")
    assert folder is not None
    yield folder
    shutil.rmtree(cache)

"""Constraints as JSON, looked at without their Python functions."""

from __future__ import annotations

import pytest

from align.decoding.constraints import ConstraintError
from align.decoding.constraints.wire import check

PREDICATE = {"python": "nowhere:function"}


@pytest.mark.parametrize(
    "spec", [PREDICATE, {"all_of": [{"regex": "[0-9]+"}, PREDICATE]}, {"any_of": [{"words": ["yes"]}, PREDICATE]}]
)
def test_a_function_that_may_be_called_is_not_loaded_and_rules_nothing_out(spec: dict[str, object]) -> None:
    check(spec, predicates=["nowhere:function"])


def test_a_function_that_may_not_be_called_is_refused() -> None:
    with pytest.raises(ConstraintError, match="may be called: none"):
        check(PREDICATE, predicates=[])

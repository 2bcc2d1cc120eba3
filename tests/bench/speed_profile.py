"""Where the time of a training step goes, by torch's profiler: its operations in a few groups.

An operation of the backward pass counts where the one of the forward pass does whose gradient it computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from speed_ways import ALL, RANK, Setup
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

TRUNK, ADAPTER, REST = "products of the trunk", "products of the adapter", "everything else"
# Of an operation, or of one that it is called from: what its name has in it, and the group.
_NAMED = {
    "in: reference": "reference",
    "Optimizer.step": "optimiser",
    "LogProb": "head",
    "_TokenLogps": "head",
    "scaled_dot": "attention",
    "flash_attention": "attention",
}
# Of what is neither: the innermost module.
_MODULES = {
    "Norm": "norms",
    "MLP": "activations",
    "Attention": "positions, copies for attention",
    "lora.layer.Linear": "scales and sums of the adapter",
}
OUTSIDE = "outside operations"
GROUPS = (TRUNK, ADAPTER, *dict.fromkeys([*_NAMED.values(), *_MODULES.values()]), REST, OUTSIDE)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_BACKWARD = 1


def group_of(names: list[str], shapes: Iterable[list[int]]) -> str:
    """The group of an operation, from its name and those that it lies in, innermost first."""
    for name in reversed(names):
        for mark, group in _NAMED.items():
            if mark in name:
                return group
    if names[0] in _PRODUCTS:
        return ADAPTER if any(RANK in shape for shape in shapes) else TRUNK
    return next((name.removeprefix("in: ") for name in names if name.startswith("in: ")), REST)


def profiled(way: str, setup: Setup) -> list[dict[str, Any]]:
    """Seconds of the last step by group, and the operations that cost most outside products, head and attention."""
    trainer = ALL[way].make(setup)
    mark_modules(trainer.model)
    if hasattr(trainer, "_as_reference"):
        trainer._as_reference = _marked(trainer._as_reference)
    recorded: list[Any] = []

    class Last(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == setup.steps - 1:
                recorded.append(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
                recorded[0].start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recorded:
                recorded[0].stop()

    trainer.add_callback(Last())
    trainer.train()
    return rows_of(recorded[0].events())


def mark_modules(model: nn.Module) -> None:
    """Let the profile name the modules of ``_MODULES`` that an operation lies in."""
    for module in model.modules():
        name = f"{type(module).__module__}.{type(module).__name__}"
        for mark, group in _MODULES.items():
            if mark in name:
                module.forward = _within(group, module.forward)  # type: ignore[method-assign]
                break


def rows_of(events: Any) -> list[dict[str, Any]]:
    """Sums of the events' own time, in seconds."""
    forward = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and event.scope != _BACKWARD and not event.name.startswith("autograd::"):
            forward[event.sequence_nr] = event  # the last of this number is the one that is derived
    groups: Counter[str] = Counter()
    operations: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for event in events:
        group = group_of(_lineage(event, forward), [shape for shape in event.input_shapes or () if shape])
        groups[group] += event.self_cpu_time_total
        if group not in (TRUNK, ADAPTER, *_NAMED.values()):
            operations[group, event.name] += event.self_cpu_time_total
            times[group, event.name] += 1
    first, last = min(event.time_range.start for event in events), max(event.time_range.end for event in events)
    groups[OUTSIDE] = last - first - sum(groups.values())
    rows: list[dict[str, Any]] = [
        {"group": group, "seconds": groups[group] / 1e6} for group in GROUPS if groups[group]
    ]
    for key, seconds in operations.most_common(15):
        rows.append({"within": key[0], "operation": key[1], "seconds": seconds / 1e6, "times": times[key]})
    return rows


def _lineage(event: Any, forward: dict[int, Any]) -> list[str]:
    """Names of an event, of those that it lies in, and of those in which the forward pass did what it derives."""
    names = []
    while event is not None:
        names.append(event.name)
        if event.scope == _BACKWARD and event.sequence_nr in forward:
            event = forward[event.sequence_nr]
            continue
        event = event.cpu_parent
    return names


def _within(group: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"in: {group}"):
            return call(*args, **kwargs)

    return marked


def _marked(context: Callable[[], Any]) -> Callable[[], Any]:
    @contextmanager
    def marked() -> Iterator[Any]:
        with record_function("in: reference"), context() as model:
            yield model

    return marked

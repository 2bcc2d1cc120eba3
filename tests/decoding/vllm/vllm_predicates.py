"""Predicates for the engine, which imports them by name."""

import time

CALLS: list[tuple[str, bool]] = []


def raises(text: str, complete: bool) -> bool:
    """Fails on a text with "ab" in it, and takes a b first so that only some come so far."""
    if "ab" in text:
        raise RuntimeError("no ab here")
    return True


def sleeps(text: str, complete: bool) -> bool:
    """Does not come back from a text with a b."""
    if "b" in text:
        time.sleep(60)
    return True


def one_b(text: str, complete: bool) -> bool:
    """At most one b."""
    CALLS.append((text, complete))
    return text.count("b") <= 1


def takes(text: str, complete: bool) -> bool:
    """Takes everything."""
    CALLS.append((text, complete))
    return True


def once(text: str, complete: bool) -> bool:
    """Fails the first time that it is asked about a text."""
    CALLS.append((text, complete))
    if text and sum(bool(asked) for asked, _ in CALLS) == 1:
        raise RuntimeError("not ready")
    return True


def shortness(completions: list[str], **columns: object) -> list[float]:
    """A rule: fewer letters are better."""
    return [-float(len(completion)) for completion in completions]

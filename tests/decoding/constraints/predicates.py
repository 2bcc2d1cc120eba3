"""Predicates for the worker, which imports them by name."""

import os
import sys
import time


def digits(text: str, complete: bool) -> bool:
    """Digits alone; prints, which must not disturb the answers."""
    print("asked", text)
    return text.isdigit() if complete else text == "" or text.isdigit()


def slow(text: str, complete: bool) -> bool:
    """Never comes back from a text with an x."""
    while "x" in text:
        time.sleep(0.1)
    return True


def counts(text: str, complete: bool) -> bool:
    """Stays in C code, where Python sees no signals, for an hour on a text with an x."""
    return sum(range(10**11)) > 0 if "x" in text else True


def quits(text: str, complete: bool) -> bool:
    """Takes its process down."""
    if text:
        os._exit(3)
    return True


def reads(text: str, complete: bool) -> bool:
    """Wants more than its arguments."""
    return sys.stdin.read() == ""


def exits(text: str, complete: bool) -> bool:
    """Ends the program, as scripts do."""
    if text:
        sys.exit(0)
    return True


def raises(text: str, complete: bool) -> bool:
    """Raises on every text but the empty one."""
    return bool(text == "" or 1 // 0)


def number(text: str, complete: bool) -> int:
    """A verdict that is none."""
    return len(text) if text else True


def never(text: str, complete: bool) -> bool:
    """Takes nothing."""
    return False

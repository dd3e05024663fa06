"""Checks of what a caller passes. Each raises gr.Error in one line that says what is allowed."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from textwrap import shorten
from typing import Any

import gradio as gr

LISTED = 20


def whole(name: str, value, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if not _is_number(value) or not low <= value <= high or value != int(value):
        raise refused(f"{name} must be a whole number from {low} to {high}.")
    return int(value)


def number(name: str, value, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if not _is_number(value) or not low <= value <= high:
        raise refused(f"{name} must be a number from {low} to {high}.")
    return float(value)


def one_of(name: str, value, allowed: Sequence[str]) -> str:
    """One of the allowed texts."""
    if value not in allowed:
        more = f", ... ({len(allowed)} in all)" if len(allowed) > LISTED else ""
        raise refused(f"{name} must be one of: {listed(allowed[:LISTED])}{more}.")
    return value


def listed(values: Iterable) -> str:
    """The values, separated by commas."""
    return ", ".join(map(str, values))


def refused(message: str) -> gr.Error:
    """The error to raise."""
    return gr.Error(plain(message), print_exception=False)


def plain(message: str, limit: int = 600) -> str:
    """A message in which nothing is HTML, since the page shows errors and warnings as HTML; cut off if it is long."""
    return shorten(message, limit, placeholder=" ...").translate({ord("<"): "‹", ord(">"): "›"})


def told(event: gr.EventData, name: str) -> Any:
    """What the page told of an event under a name; None if it told nothing, or it was not our page."""
    try:
        return getattr(event, name, None)
    except TypeError:  # whoever asked sent no data
        return None


def page_request(function: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """Decorates a function that the page calls: what is forgotten, or no request of the page, is answered `expired`."""

    @wraps(function)
    def answer(request):
        try:
            return function(request)
        except gr.Error as error:
            return dict(expired=True, problem=error.message)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
            return dict(expired=True)

    return answer


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

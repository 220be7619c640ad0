"""The CUDA driver: its bindings, and its errors as exceptions."""

from functools import cache
from typing import Any


@cache
def bindings() -> Any:
    """cuda.bindings.driver, imported where there is a driver only, and once: an import statement in each launch would take 0.3 us."""
    from cuda.bindings import driver

    return driver


def checked(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call, or its error as an exception."""
    error, *values = result
    if error:
        raise RuntimeError(f"{what} failed: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)

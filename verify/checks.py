"""Assertions whose message is enough: what was compared, where it is worst, what stands there, and by how much it is off."""

import numpy as np

from verify.tolerances import worst_ratio


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def _place(array: np.ndarray, flat_index: int) -> str:
    return str(tuple(int(i) for i in np.unravel_index(flat_index, array.shape)))


def assert_result(out: np.ndarray, lse: np.ndarray, out_shape: tuple[int, ...], lse_shape: tuple[int, ...], dtype: str) -> None:
    """A decode's results have the contract's shapes and dtypes."""
    for name, array, shape, want in (("out", out, out_shape, dtype), ("lse", lse, lse_shape, "float32")):
        if array.shape != shape:
            raise AssertionError(f"{name} has shape {array.shape}, but must have shape {shape}")
        if str(array.dtype) != want:
            raise AssertionError(f"{name} has dtype {array.dtype}, but must be {want}")


def assert_within(name: str, got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> float:
    """|got - want| <= bound for every element; returns the worst |got - want| / bound. Equal infinities are equal."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    bound = np.broadcast_to(bound, want.shape)
    ratio = worst_ratio(got, want, bound)
    if ratio <= 1.0:
        return ratio
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.where(got == want, 0.0, np.abs(got - want))
        ratios = np.where(errors == 0.0, 0.0, np.where(np.isnan(errors), np.inf, errors / bound))
    at = int(ratios.argmax())
    raise AssertionError(
        f"{name}{_place(got, at)} is {got.flat[at]:.9g}, but must be {want.flat[at]:.9g} within {bound.flat[at]:.3g}: "
        f"the error is {ratio:.3g} times the bound; {np.count_nonzero(ratios > 1.0)} of {ratios.size} elements are outside theirs")


def assert_same_bits(name: str, got: np.ndarray, want: np.ndarray, why: str) -> None:
    """Not one bit differs (so NaN equals itself, and -0 is not 0)."""
    different = np.flatnonzero(_bits(got) != _bits(want))
    if len(different):
        at = int(different[0])
        raise AssertionError(
            f"{name}{_place(got, at)} changed from {want.flat[at]} to {got.flat[at]} (bits {_bits(want).flat[at]:#x} to "
            f"{_bits(got).flat[at]:#x}), but {why} must change no bit; {len(different)} of {got.size} elements differ")


def assert_same_results(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray], why: str) -> None:
    assert_same_bits("out", got[0], want[0], why)
    assert_same_bits("lse", got[1], want[1], why)

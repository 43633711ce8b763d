"""The built-in model: a shared sum."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import InvalidRequest, Unavailable

_checkpoint: Callable[[float], None] | None = None  # in the process of the primary parameter server


def checkpoint_with(checkpoint: Callable[[float], None]) -> None:
    """Have every new sum saved by this, before it is assigned. It raises Unavailable where it cannot."""
    global _checkpoint
    _checkpoint = checkpoint


def checkpoint_sum(total: np.ndarray) -> np.ndarray:
    """Called by the adder's graph with the new sum before it is assigned: one that cannot be saved fails the run."""
    try:
        if _checkpoint:
            _checkpoint(total.item())
    except Unavailable as error:
        raise RuntimeError(f"HTTP {error.status}: {error}") from None
    return total


def build_adder(tf):
    """The built-in model: a shared float64 sum to which values are added; each gets the sum right after its own add.

    Read, cumulative sum and assignment are one critical section of one ``session.run``, so that no other worker's add
    slips between (tensorflow#6360). The new sum is checked, and saved, before it is assigned: a run that fails changes
    nothing, and no sum is answered that is not on disk. float64, because a float32 sum stops counting at 2**24.
    """
    value = tf.placeholder(tf.float64, [None], name="value")
    total = tf.get_variable("sum", [], tf.float64, tf.zeros_initializer())

    def add():
        sums = tf.cumsum(tf.concat([[total.read_value()], value], axis=0))
        sums = tf.debugging.check_numerics(sums, "the sum would not be finite")
        new = tf.numpy_function(checkpoint_sum, [sums[-1]], tf.float64)  # runs where the variable is
        new.set_shape([])
        with tf.control_dependencies([total.assign(new, read_value=False)]):
            return sums[1:]

    return {"serving_default": ({"value": value}, {"sum": tf.CriticalSection(shared_name="sum").execute(add)})}


def require_finite(value: Any) -> float:
    """Raises InvalidRequest unless the value is one finite number."""
    number = value.item() if isinstance(value, np.number) else value  # numpy would compare in the value's own precision
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not abs(number) <= sys.float_info.max:
        raise InvalidRequest(f"value must be one finite number, not {reprlib.repr(value)}")
    return float(number)


build_adder.atomic = True  # rows are applied in order, and a run that fails has changed nothing: so requests share runs

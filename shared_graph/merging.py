"""Which signatures may share runs, found by trying them; and their first, slow, run."""

from __future__ import annotations

import contextlib
import logging

import numpy as np

from shared_graph.errors import ModelError, first_sentence
from shared_graph.graph import Graph
from shared_graph.models import Signature
from shared_graph.options import Options

log = logging.getLogger(__name__)


def find_merged(graph: Graph, options: Options) -> list[str]:
    """The signatures of which several requests may share a run."""
    return [
        name
        for name, signature in graph.signatures.items()
        if signature.inputs
        and not signature.calls_out
        and all(spec.has_rows for spec in [*signature.inputs.values(), *signature.outputs.values()])
        and (graph.atomic if signature.writes else _rows_are_independent(graph, signature, options))
    ]


def _rows_are_independent(graph: Graph, signature: Signature, options: Options) -> bool:
    """Is each row's answer the same, whatever rows it shares a run with? Tried on random rows.

    Not a matter of course: a softmax over the batch, its mean or its length are other numbers in other company.
    Matrix products of several rows add in another order than those of one, and so differ in the last digits: that
    is allowed, unless ``--exact``; many sizes then, since kernels are picked by shape.
    """
    sizes = [2, 3, 5, 8, 13, 16, 32, options.max_batch] if options.exact else [2, 8, 16]
    sample = sample_rows(signature, max(sizes))
    try:
        alone = [graph.run(signature.name, [array[i : i + 1] for array in sample]) for i in range(8)]
        for size in sizes:
            together = graph.run(signature.name, [array[:size] for array in sample])
            for result, *singles in zip(together, *alone[:size]):
                if len(result) != size or not same(result[:8], np.concatenate(singles), options.exact):
                    return False
    except Exception as error:  # it does not like our random rows, and we cannot know what it likes
        log.info("model %s: %r is not merged: %s", graph.source.name, signature.name, first_sentence(error))
        return False
    return True


def warm_up(graph: Graph) -> None:
    """The first run of a signature is slow (tensorflow/serving#385): do it early, changing nothing."""
    for signature in graph.signatures.values():
        if not signature.calls_out and (not signature.writes or graph.atomic):
            with contextlib.suppress(ModelError):  # a sample that the model refuses has warmed it up as well
                graph.run(signature.name, sample_rows(signature, 0 if graph.atomic else 1))


def sample_rows(signature: Signature, rows: int) -> list[np.ndarray]:
    """Random inputs with this many rows, by sorted name: numbers of several magnitudes, zeros and ones, words."""
    random, arrays = np.random.default_rng(0), []
    words = b"the of and to in is good bad new film music price 7 2024 London ! ? :-)".split()
    for spec in signature.inputs.values():
        shape = tuple(3 if n is None else n for n in spec.shape or ())
        shape = (rows, *shape[1:]) if spec.has_rows else shape
        if spec.dtype == "object":
            array = np.empty(shape, object)
            array.flat = [b" ".join(random.choice(words, random.integers(0, 12))) for _ in range(array.size)]
        elif np.dtype(spec.dtype).kind in "biu":
            array = random.integers(0, 2, shape)  # an index must be within its table
        else:
            array = random.standard_normal(shape) * 10 ** random.uniform(-2, 2, shape[:1] + (1,) * len(shape[1:]))
        arrays.append(array.astype(spec.dtype))
    return arrays


def same(a: np.ndarray, b: np.ndarray, exact: bool) -> bool:
    """Are two answers equal: floats to rounding, relative to the largest number of their row, all else exactly?"""
    if a.shape != b.shape or a.dtype == object or a.dtype.kind in "biu":
        return np.array_equal(a, b)
    if exact or not a.size:
        return a.tobytes() == b.tobytes()
    epsilon = 2**-7 if a.dtype.name == "bfloat16" else np.finfo(a.dtype).eps
    units = 8 if a.itemsize == 2 else 128  # of 16 bits, whose last digits are coarse
    a, b = (array.astype(np.result_type(array, np.float64)).reshape(len(array), -1) for array in (a, b))
    largest = np.max(np.abs(b), axis=1, keepdims=True, where=np.isfinite(b), initial=0)
    return np.allclose(a, b, rtol=0, atol=units * epsilon * largest, equal_nan=True)

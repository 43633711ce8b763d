"""Which signatures may share runs, found by trying them; and their first, slow, run.

Not a matter of course: a softmax over the batch, its mean or its length are other numbers in other company. Matrix
products of several rows add in another order than those of one, and so differ in the last digits: that is allowed,
unless ``--exact``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import NamedTuple

import numpy as np

from shared_graph.errors import ModelError, first_sentence
from shared_graph.graph import Graph
from shared_graph.models import Signature
from shared_graph.options import Options

log = logging.getLogger(__name__)

MAX_TRIED = 2**24  # numbers in the rows of a trial, which are there several times at once


class Verdict(NamedTuple):
    """Names of signatures."""

    batchable: tuple[str, ...] = ()  # rows of several requests may share a run
    undecided: tuple[str, ...] = ()  # random rows were refused, or told nothing: to be tried on real ones


def find_batchable(graph: Graph, options: Options) -> Verdict:
    """Which signatures' requests may share a run; for a model that changes its weights, with others as well."""
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}

    @functools.cache
    def may_share_runs(name: str) -> bool | None:
        signature = graph.signatures[name]
        return may_share(signature, graph.atomic) and (signature.mutates_state or try_rows(graph, signature, options))

    for name in graph.signatures:
        found[may_share_runs(graph.equal.get(name, name))].append(name)
    if graph.mutates_state and not graph.atomic and found[True]:
        found[True] = _with_other_weights(graph, found[True], options)
    return Verdict(tuple(found[True]), tuple(found[None]))


def may_share(signature: Signature, atomic: bool) -> bool:
    """As far as its description tells."""
    specs = [*signature.inputs.values(), *signature.outputs.values()]
    is_safe = atomic if signature.mutates_state else not signature.runs_python
    return bool(signature.inputs) and is_safe and all(spec.has_rows for spec in specs)


def _with_other_weights(graph: Graph, names: list[str], options: Options) -> list[str]:
    """Those that share runs also with other weights, for a model that changes them when it runs."""
    weights, random = graph.variables.get_weights(), np.random.default_rng(0)
    weights = {name: value for name, value in weights.items() if value.dtype != object}
    graph.variables.set_weights({name: _other(random, value) for name, value in weights.items()})
    try:
        return [name for name in names if try_rows(graph, graph.signatures[name], options) is not False]
    finally:
        graph.variables.set_weights(weights)


def _other(random: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """What may be a switch is turned; all else is random."""
    other = value == 0 if value.dtype.kind in "biu" else random.standard_normal(value.shape)
    return np.asarray(other, value.dtype)


def try_rows(graph: Graph, signature: Signature, options: Options) -> bool | None:
    """Is each row's answer the same, whatever rows it shares a run with? Tried on random rows, and where whole numbers
    are asked for on larger ones, too, unless those are refused. None: random rows are refused, or tell nothing."""
    sizes = [2, 3, 5, 8, 13, 16, 32, options.max_batch] if options.exact else [2, 8, 16]  # kernels are picked by shape
    of_a_row = sum(array.size for array in sample_rows(signature, 1))
    sizes = [size for size in sorted(sizes) if size * of_a_row <= MAX_TRIED or size == 2]
    verdict = _try(graph, signature, sample_rows(signature, sizes[-1]), sizes, options.exact)
    if verdict and any(np.dtype(spec.dtype).kind in "iu" for spec in signature.inputs.values()):
        return _try(graph, signature, sample_rows(signature, sizes[-1], 60), sizes, options.exact) is not False
    return verdict


def _try(graph: Graph, signature: Signature, sample: list[np.ndarray], sizes: list[int], exact: bool) -> bool | None:
    tried = sizes[-1] if exact else min(8, sizes[-1])
    try:
        alone = [graph.run(signature.name, [array[i : i + 1] for array in sample]) for i in range(tried)]
        expected = [np.concatenate(answers) for answers in zip(*alone)]
        for size in sizes:
            together = graph.run(signature.name, [array[:size][::-1].copy() for array in sample])  # the first come last
            for result, wanted in zip(together, expected):
                if len(result) != size or not answers_equal(result[::-1][:tried], wanted[:size], exact):
                    return False
    except ModelError as error:  # it does not like our random rows, and we cannot know what it likes
        if error.status == 499:  # cancelled: it has taken too long
            raise
        log.info("model %s: %r refuses random rows: %s", graph.source.name, signature.name, first_sentence(error))
        return None
    except (ValueError, TypeError):  # rows of answers that do not fit together
        return False
    return True if is_telling(signature, expected) else None


def is_telling(signature: Signature, outputs: list[np.ndarray]) -> bool:
    """Would these answers show it if rows had others in company? Not where all rows have the same one (no number, only
    unknown words, nothing found). Nor where they do in an output that may grow with the batch, unless that lists
    several things, such as the names of all classes."""
    varies = [not answers_equal(np.broadcast_to(rows[:1], rows.shape), rows, False) for rows in outputs]
    may_grow = [
        (spec.shape is None or None in spec.shape[1:]) and np.unique(rows[:1]).size < 2
        for rows, spec in zip(outputs, signature.outputs.values())
    ]
    return any(varies) and all(differs or not grows for differs, grows in zip(varies, may_grow))


def warm_up(graph: Graph) -> None:
    """The first run of a signature is slow (tensorflow/serving#385): do it early, changing nothing."""
    for signature in graph.signatures.values():
        if signature.refusal is None and not signature.runs_python and (not signature.mutates_state or graph.atomic):
            with contextlib.suppress(ModelError):  # a sample that the model refuses has warmed it up as well
                graph.run(signature.name, sample_rows(signature, 0 if graph.atomic else 1))


def sample_rows(signature: Signature, rows: int, largest: int = 1) -> list[np.ndarray]:
    """Random inputs with this many rows, by sorted name: numbers of several magnitudes, in every other row with zeros
    at the end; words, and lists of them; whole numbers: zeros and ones, or of each row's own range up to twice the
    ``largest``."""
    random, arrays = np.random.default_rng(0), []
    words = b"the of and to in is good bad new film price 7 2024 London ! :-) a,b a;b a|b|c a/b/c a-b a_b a=b&c".split()
    for spec in signature.inputs.values():
        shape = tuple(3 if n is None else n for n in spec.shape or ())
        shape = (rows, *shape[1:]) if spec.has_rows else shape
        if spec.dtype == "object":
            array = np.empty(shape, object)
            lengths = random.integers(0, random.choice([4, 12, 70], array.size))
            array.flat = [b" ".join(random.choice(words, length)) for length in lengths]
        elif np.dtype(spec.dtype).kind in "biu":  # an index must be within its table
            low = random.integers(0, largest, shape[:1] + (1,) * len(shape[1:]))
            array = random.integers(low, low + random.integers(1, largest + 1, low.shape) + 1, shape)
        else:
            magnitude = 10 ** random.uniform(-2, 2, shape[:1] + (1,) * len(shape[1:]))
            array = random.standard_normal(shape, np.float32) * np.float32(magnitude)
            for i in range(1, rows, 2) if spec.has_rows else ():
                row = array[i : i + 1].reshape(-1)
                row[random.integers(row.size + 1) :] = 0  # as what is padded has them
        arrays.append(array.astype(spec.dtype))
    return arrays


def answers_equal(a: np.ndarray, b: np.ndarray, exact: bool) -> bool:
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

"""Which signatures may share runs, and their first run: with graphs that the tests play."""

import types

import numpy as np
import pytest

from shared_graph.errors import ModelError
from shared_graph.merging import Verdict, answers_equal, find_batchable, is_telling, sample_rows, warm_up
from shared_graph.models import Signature, TensorSpec
from shared_graph.options import Options


class PlayedGraph:
    """Each signature is a function of one array of rows, and of the weights that there are."""

    def __init__(self, function, dtype: str = "float32", atomic: bool = False, weights=None, **kind):
        spec, self.function, self.runs = TensorSpec(dtype, (None,)), function, []
        kind = {"mutates_state": False, "runs_python": False} | kind
        self.signatures = {"s": Signature("s", {"x": spec}, {"y": spec}, "", **kind)}
        self.atomic, self.mutates_state, self.source = atomic, weights is not None, types.SimpleNamespace(name="m")
        self.variables, self.weights, self.equal = self, dict(weights or {}), {}

    def run(self, name: str, feed: list[np.ndarray]) -> list[np.ndarray]:
        self.runs.append(len(feed[0]))
        [x] = feed
        return [self.function(x, **self.weights)]

    def get_weights(self) -> dict:
        return dict(self.weights)

    def set_weights(self, weights: dict) -> None:
        self.weights |= weights


def fail(status: int):
    def run(x):
        raise ModelError("no", status)

    return run


def refuse(x):
    return fail(400)(x) if x.max() > 1 else x


yes, no, unknown = Verdict(("s",)), Verdict(), Verdict((), ("s",))


@pytest.mark.parametrize(
    "function, dtype, verdict, exactly",
    [
        (lambda x: 2 * x, "float32", yes, yes),
        (lambda x: x - x.mean(), "float32", no, no),
        (lambda x: x / np.abs(x).max(), "float32", no, no),
        (lambda x: x + len(x), "float32", no, no),
        (lambda x: x + (len(x) == 16), "float32", no, no),
        (lambda x: x * np.float32(1 + (len(x) == 13) * 1e-6), "float32", yes, no),
        (lambda x: x * np.float32(1 + (len(x) > 1) * 1e-4), "float32", no, no),
        (lambda x: x[::-1], "float32", no, no),
        (lambda x: np.where(np.arange(len(x)) < 8, x, 0), "float32", no, no),  # there is room for eight
        (lambda x: np.append(x, x[:1] * 0), "float32", no, no),
        (lambda x: x[:1], "float32", no, no),
        (lambda x: x[:9], "float32", no, no),
        (lambda x: np.zeros((len(x), 1 + int(abs(x[0]) * 1e6) % 7)), "float32", no, no),
        (lambda x: x * np.nan, "float32", unknown, unknown),
        (lambda x: 0 * x, "float32", unknown, unknown),
        (lambda x: 0 * x + (len(x) == 8), "float32", no, no),
        (fail(400), "float32", unknown, unknown),
        (fail(500), "float32", unknown, unknown),
        (lambda x: 3 * x, "int32", yes, yes),
        (lambda x: np.where(x > 40, len(x), x), "int32", no, no),  # small numbers tell nothing
        (refuse, "int32", yes, yes),  # an index of two, say
        (lambda x: ~x, "bool", yes, yes),
        (lambda x: x ^ x.any(), "bool", no, no),
        (lambda x: x, "object", yes, yes),
        (lambda x: x + max(x), "object", no, no),
    ],
)
def test_rows_share_runs_where_the_company_does_not_matter_and_what_cannot_be_tried_is_not_known(
    function, dtype, verdict, exactly
):
    assert find_batchable(PlayedGraph(function, dtype), Options()) == verdict
    assert find_batchable(PlayedGraph(function, dtype), Options(exact=True)) == exactly


def test_signatures_that_do_the_same_are_tried_once():
    graph, alone = PlayedGraph(lambda x: 3 * x), PlayedGraph(lambda x: 3 * x)
    graph.signatures["t"], graph.equal = graph.signatures["s"], {"s": "s", "t": "s"}
    assert find_batchable(graph, Options()) == Verdict(("s", "t")) and find_batchable(alone, Options()) == yes
    assert graph.runs == alone.runs != []


def test_a_trial_that_is_cancelled_is_no_verdict():
    with pytest.raises(ModelError):
        find_batchable(PlayedGraph(fail(499)), Options())


@pytest.mark.parametrize(
    "kind, verdict",
    [({"mutates_state": True}, no), ({"runs_python": True}, no), ({"mutates_state": True, "atomic": True}, yes)],
)
def test_what_writes_or_calls_python_is_not_tried_and_shares_runs_only_where_its_function_says_so(kind, verdict):
    graph = PlayedGraph(lambda x: x, **kind)
    assert find_batchable(graph, Options()) == verdict and graph.runs == []


def test_what_has_no_inputs_or_no_rows_shares_no_runs():
    for side in ("inputs", "outputs"):
        for specs in ({}, {"x": TensorSpec("float32", ())}, {"x": TensorSpec("float32", (3,))}):
            graph = PlayedGraph(lambda x: x)
            setattr(graph.signatures["s"], side, specs)
            if side == "inputs" or specs:
                assert find_batchable(graph, Options()) == no and graph.runs == []


@pytest.mark.parametrize("switch", [np.bool_(False), np.int64(0), np.bool_(True), np.float32(0)])
def test_a_model_that_changes_its_weights_is_tried_with_others_too_and_has_its_own_afterwards(switch):
    before = switch.copy()

    def looks_across(x, switch, word):
        assert word == b"a", "a string is no number"
        return x - x.mean() if switch != before else 2 * x

    graph = PlayedGraph(looks_across, weights={"switch": switch, "word": np.array(b"a", object)})
    assert find_batchable(graph, Options()) == no
    assert graph.weights == {"switch": before, "word": b"a"}
    graph = PlayedGraph(lambda x, switch: 2 * x, weights={"switch": switch})
    assert find_batchable(graph, Options()) == yes and graph.weights == {"switch": before}
    graph.function = lambda x, switch: fail(499)(x) if switch != before else 2 * x
    with pytest.raises(ModelError):
        find_batchable(graph, Options())
    assert graph.weights == {"switch": before}, "the weights of a trial are left"


ONE, EPSILON = np.float32([[1, 100]]), np.finfo(np.float32).eps


@pytest.mark.parametrize(
    "a, b, equal, exactly",
    [
        (ONE, ONE, True, True),
        (ONE, ONE.reshape(2), False, False),
        (ONE, ONE + np.float32([[100 * 100 * EPSILON, 0]]), True, False),  # by the largest of the row
        (ONE, ONE + np.float32([[150 * 100 * EPSILON, 0]]), False, False),
        (np.float32([[1], [100]]), np.float32([[1 + 200 * EPSILON], [100]]), False, False),
        (np.float16([1]), np.float16([1 + 6 * 2**-10]), True, False),
        (np.float16([1]), np.float16([1 + 12 * 2**-10]), False, False),
        (np.float64([1]), np.float64([1 + 100 * 2**-52]), True, False),
        (np.float64([1]), np.float64([1 + 1e-12]), False, False),
        (np.float32([np.nan, np.inf, 0]), np.float32([np.nan, np.inf, 0]), True, True),
        (np.float32([[np.inf, 1]]), np.float32([[np.inf, 2]]), False, False),
        (np.float32([np.inf]), np.float32([-np.inf]), False, False),
        (np.float32([np.nan]), np.float32([0]), False, False),
        (np.float32([0.0]), np.float32([-0.0]), True, False),
        (np.complex64([1j]), np.complex64([1j * (1 + 50 * EPSILON)]), True, False),
        (np.complex64([1j]), np.complex64([1]), False, False),
        (np.int32([1]), np.int32([2]), False, False),
        (np.array([b"a"], object), np.array([b"b"], object), False, False),
        (np.array([b"a"], object), np.array([b"a"], object), True, True),
        (np.zeros((0, 3)), np.zeros((0, 3)), True, True),
    ],
)
def test_answers_are_equal_to_rounding_or_to_the_last_bit(a, b, equal, exactly):
    assert (answers_equal(a, b, False), answers_equal(a, b, True)) == (equal, exactly)


SAME, ONES, WORDS = np.full((2, 3), np.nan), np.ones((2, 3)), np.array([[b"a"], [b"b"]], object)


@pytest.mark.parametrize(
    "answers, telling",
    [
        ([(ONES, (None, 3))], False),
        ([(SAME, (None, 3))], False),
        ([(-SAME, (None, 3))], False),
        ([(np.zeros((2, 0)), (None, None))], False),
        ([(ONES * [[1], [2]], (None, 3))], True),
        ([(WORDS, (None, 1))], True),
        ([(WORDS, None)], True),
        ([(ONES, (None, 3)), (WORDS, (None, 1))], True),  # such as the number of all classes
        ([(ONES, (None, None)), (WORDS, (None, 1))], False),  # as many as the row of the batch that has most
        ([(ONES, None), (WORDS, (None, 1))], False),
        ([(SAME, (None, None)), (WORDS, (None, 1))], False),
        ([(np.array([[b"no", b"yes"]] * 2, object), (None, None)), (WORDS, (None, 1))], True),
        ([(ONES[:1], (None, 3))], False),
    ],
)
def test_that_all_rows_have_the_same_answer_tells_nothing_nor_does_such_an_output_that_may_grow(answers, telling):
    outputs = {str(i): TensorSpec("float32", shape) for i, (_, shape) in enumerate(answers)}
    signature = Signature("s", {}, outputs, "", False, False)
    assert is_telling(signature, [rows for rows, _ in answers]) == telling


@pytest.mark.parametrize(
    "kind, runs",
    [
        ({}, [1]),
        ({"refusal": "it cannot be run"}, []),
        ({"runs_python": True}, []),
        ({"mutates_state": True}, []),
        ({"mutates_state": True, "atomic": True}, [0]),
    ],
)
def test_the_first_run_is_early_and_changes_nothing(kind, runs):
    graph = PlayedGraph(lambda x: x, **kind)
    warm_up(graph)
    assert graph.runs == runs
    warm_up(PlayedGraph(fail(400)))


def test_sample_rows_are_of_the_declared_shape_and_type_and_unlike_each_other():
    specs = {
        "f": TensorSpec("float32", (None, 2)),
        "i": TensorSpec("int8", (None,)),
        "o": TensorSpec("object", (None, None)),
        "s": TensorSpec("float64", ()),
    }
    f, i, o, s = sample_rows(Signature("s", specs, {}, "", False, False), 50)
    assert (f.dtype, f.shape, i.dtype, i.shape, o.shape) == (np.float32, (50, 2), np.int8, (50,), (50, 3))
    assert set(i) == {0, 1} and s.shape == () and all(isinstance(word, bytes) for word in o.flat)
    numbers = np.abs(f[::2])
    assert len(np.unique(numbers)) == 50 and numbers.max() > 1000 * numbers.min() and len(set(o.flat)) > 100
    padded = f[1::2] == 0
    assert padded[:, 1].any() and not padded.all() and (padded[:, 1] >= padded[:, 0]).all()
    [large] = sample_rows(Signature("s", {"i": specs["i"]}, {}, "", False, False), 50, 60)
    assert large.min() >= 0 and 60 < large.max() < 120

"""All models that strangers published, in one server: each is served as in a plain session, or over with its reason."""

import contextlib
import json
import os
import re
import time

import example_models
import numpy as np
import pytest
from benchmark import taxi_ride
from conftest import REPOSITORY, owned_by_session, real_models, wait_until
from test_models import Reference, assert_same

from shared_graph.cluster import Cluster
from shared_graph.errors import ModelError
from shared_graph.rest_api import serialize_example

MORE = real_models("more_models")
ALL = real_models() | MORE
pytestmark = pytest.mark.skipif(not MORE, reason="they are not there")
OTHER_TAGS = "available tags '[{'transform'}]'"


def readme() -> dict[str, str | None]:
    """What the README says of each: why it is not served, None if it is."""
    with open(os.path.join(REPOSITORY, "..", "shared", "more_models", "README.md")) as file:
        rows = re.findall(r"^\| `(\w+)` \|.*\| (AVAILABLE|END.*) \|$", file.read(), re.M)
    reasons = {name: re.search('"(.*)"', fate) for name, fate in rows if fate != "AVAILABLE"}
    return dict.fromkeys(ALL) | {name: reason[1] if reason else OTHER_TAGS for name, reason in reasons.items()}


FATES = readme() if MORE else {}
SERVED = [name for name, reason in FATES.items() if reason is None]


def settled(cluster: Cluster) -> bool:
    """Is it ready, and known of each model what becomes of it?"""
    models = cluster.health()["models"]
    return cluster.health()["status"] == "ready" and all(
        name in models and (models[name]["version"] is not None or models[name]["error"]) for name in cluster.names
    )


def started(names) -> Cluster:
    cluster = Cluster(workers=1, model=[ALL[name] for name in names])
    cluster.names = list(names)
    cluster.start_in_background()
    wait_until(lambda: settled(cluster))
    return cluster


@pytest.fixture(scope="module")
def all_models():
    with owned_by_session():
        cluster = started(ALL)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("name", FATES)
def test_each_is_available_or_over_with_the_reason_that_its_readme_names(all_models, name):
    [version] = all_models.status.version_status(name, None)["model_version_status"]
    assert version["state"] == ("END" if FATES[name] else "AVAILABLE")
    assert (FATES[name] or "") in version["status"]["error_message"]


def rides(seed: int) -> bytes:
    return serialize_example("ride", taxi_ride(seed))


class TaxiReference(Reference):
    """Its examples have features of certain names."""

    def sample(self, signature: str) -> dict[str, np.ndarray]:
        rows = self.random.integers(1, 4)
        examples = np.array([rides(int(seed)) for seed in self.random.integers(0, 1000, rows)], object)
        return dict.fromkeys(self.plain.names[signature][0], examples)


class WithoutTraining(Reference):
    """ "train" changes what the others answer, and so comes last."""

    def __init__(self, name: str, source: str):
        super().__init__(name, source)
        self.cases = sorted(self.cases, key=lambda case: case[0] == "train")


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_answers_as_in_a_plain_session_alone_and_in_company(all_models, clients, name):
    kind = {"estimator_taxi": TaxiReference, "train_signature": WithoutTraining}.get(name, Reference)
    plain = kind(name, ALL[name])
    cases = [case for case in plain.cases if case[0] != "train"]
    for count in (1, 32):
        outputs = clients(count, lambda case: all_models.predict(case[1], name, case[0]), cases)
        for output, (signature, inputs, _) in zip(outputs, cases):
            assert_same(output, plain.plain.predict(inputs, signature))


def test_examples_come_to_share_runs_and_a_broken_one_fails_alone(all_models, clients):
    plain, name = example_models.PlainSession(ALL["estimator_taxi"]), "estimator_taxi"
    examples = [rides(seed) if seed % 16 else b"broken" for seed in range(128)]
    [key], [signature] = plain.names["classification"][0], ["classification"]
    expected = {e: plain.predict({key: np.array([e], object)}, signature) for e in examples if e != b"broken"}

    def ask(example: bytes):
        try:
            return all_models.predict({key: np.array([example], object)}, name, signature)
        except ModelError as error:
            return error

    def shares_runs() -> bool:
        for example, answer in zip(examples, clients(64, ask, examples)):
            if example == b"broken":
                assert isinstance(answer, ModelError) and answer.status == 400 and "parse" in str(answer)
            else:
                assert_same(answer, expected[example])
        return signature in all_models.health()["models"][name]["merged"]

    wait_until(shares_runs, 60)
    shares_runs()


def test_the_readmes_classification(all_models):
    ride = {"trip_miles": 1.0, "fare": 2.0, "trip_start_month": 3, "trip_start_hour": 4, "trip_start_day": 5}
    ride |= {"trip_start_timestamp": 6, "pickup_latitude": 41.0, "pickup_longitude": -87.0, "dropoff_latitude": 41.0}
    ride |= {"dropoff_longitude": -87.0, "trip_seconds": 60, "payment_type": "Cash", "company": "x"}
    body = json.dumps({"examples": [ride]}).encode(), False
    [[[zero, no], [one, yes]]] = json.loads(all_models.request("estimator_taxi", "classify", body))["results"]
    assert (zero, one) == ("0", "1") and abs(no - 0.8184216) < 1e-6 and abs(yes - 0.18157838) < 1e-6


@pytest.mark.long
def test_bad_ones_among_them_make_the_start_at_most_half_as_long_again():
    seconds = []
    for names in (SERVED, ALL):
        start = time.monotonic()
        with contextlib.closing(started(names)):
            seconds.append(time.monotonic() - start)
    assert seconds[1] < 1.5 * seconds[0]

"""The page of ``GET /dashboard`` in a real browser: what it shows, what it asks for, and that it is harmless."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time

import pytest
from browser import CHROMIUM, Browser
from conftest import Server, long, owned_by_session, wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module", params=[long("flask"), "starlette"])
def server(request):
    """Each front end in turn, with two workers, as a process of its own: a worker is killed."""
    models = "--model", "example_models:linear", "--model", "example_models:several"
    with owned_by_session():
        server = Server(request.param, "--workers", "2", *models)
    with server:
        yield server.wait_ready(workers=2)


@pytest.fixture
def page(server):
    """The page, when it knows its actors; in the end it has had nothing to complain of."""
    with Browser() as browser:
        browser.look_like(1280, 800)
        browser.open(f"http://127.0.0.1:{server.port}/dashboard")
        browser.wait_for("document.querySelectorAll('#actors tr').length === 3")
        yield browser
        assert browser.complaints() == []


@contextlib.contextmanager
def load(server):
    """Adds, one after another, while the block runs."""
    ended = threading.Event()

    def add():
        while not ended.wait(0.01):
            server.get("/?value=1")

    thread = threading.Thread(target=add)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def row(page: Browser, actor: str) -> list[str]:
    """State, process and restarts of an actor, as they are shown."""
    cells = f"[...document.querySelector('#actors [data-key=\"{actor}\"]').cells]"
    return page.evaluate(f"{cells}.slice(1, 4).map(cell => cell.textContent)")


def predict_with_curl(page: Browser):
    """What the page's line answers in a shell."""
    run = subprocess.run(["sh", "-c", page.text("#try-curl")], capture_output=True, timeout=60, check=True)
    return json.loads(run.stdout)


def send(page: Browser):
    """What the page's form answers."""
    page.evaluate("document.getElementById('try-status').textContent = ''")
    page.click("#try-send")
    page.wait_for("/ in /.test(document.getElementById('try-status').textContent)")
    return json.loads(page.text("#try-answer"))


def choose(page: Browser, model: str) -> None:
    """Choose a model in the form, and wait for the body made from its metadata."""
    page.wait_for(f"[...document.getElementById('try-model').options].some(its => its.value === {json.dumps(model)})")
    page.evaluate("document.getElementById('try-note').textContent = ''")
    page.type("#try-model", model)
    page.wait_for("document.getElementById('try-note').textContent.startsWith('Takes ')")


def test_it_shows_who_is_there(server, page):
    health = server.get("/health").json
    for kind in ("parameter server", "worker"):
        for its in health[f"{kind}s".replace(" ", "_")]:
            assert row(page, f"{kind} {its['index']}") == ["ready", str(its["pid"]), str(its["restarts"])]
    assert page.text("#status") == "ready"
    shown = page.evaluate("[...document.querySelectorAll('.model h3')].map(its => its.textContent)")
    assert sorted(shown) == sorted(health["models"])
    page.wait_for("document.querySelector('.model[data-model=linear]').textContent.includes('x: float32[')")


def test_a_killed_worker_is_seen_to_go_and_to_come_back(server, page):
    _, pid, restarts = row(page, "worker 1")
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: row(page, "worker 1")[0] == "restarting", 20)
    assert row(page, "worker 0")[0] == "ready"
    wait_until(lambda: row(page, "worker 1")[0] == "ready", 120)
    assert row(page, "worker 1")[1] != pid and row(page, "worker 1")[2] == str(int(restarts) + 1)
    assert "worker 1: ready → restarting" in page.text("#events")


def test_plots_rise_while_requests_come(server, page):
    page.wait_for("past.length >= 2")
    curves = [
        f"document.querySelector('#{plot}-plot path[data-name=\"{name}\"]')"
        for plot, name in (("rate", "adder"), ("latency", "adder median"))
    ]
    with load(server):
        page.wait_for(f"{curves[0]}?.getBBox().height > 20")
        page.wait_for(f"{curves[1]}?.getAttribute('d').includes('L')")
        cells = "[...document.querySelector('#traffic [data-key=adder]').cells].map(cell => cell.textContent)"
        _, rate, *latencies, _, _ = page.evaluate(cells)
    assert float(rate) > 1 and all(re.fullmatch(r"[\d.]+ ms", latency) for latency in latencies), latencies
    assert "answers a second" in page.text("#rate-plot") and "30 s" in page.text("#rate-plot")
    assert "seconds" in page.text("#latency-plot") and "adder" in page.text("#legend")


def test_a_value_is_added_and_the_sum_shown(server, page):
    before = server.get("/?value=0").json["result"]
    page.type("#value", "2.5")
    page.click("#add button")
    page.wait_for(f"Number(document.getElementById('sum').textContent) === {before + 2.5}")
    page.type("#value", "x' & <b>")
    page.evaluate("document.getElementById('add').requestSubmit()")
    page.wait_for("document.getElementById('sum-note').textContent.includes('must be one finite number')")
    assert page.evaluate("document.querySelector('#sum-note b')") is None
    complaints = [its for its in page.complaints() if "status of 400" not in its]  # which Chromium tells of itself
    page.events.clear()
    assert complaints == []


def test_the_form_predicts_and_its_line_answers_the_same(page):
    choose(page, "linear")
    assert send(page) == predict_with_curl(page) == {"predictions": [[9.5, 11.5]]}
    page.type("#try-body", '{"instances":\n [[1, 0, 0], [0, 0, 1]],\n "note": "it\'s $HOME `id` \\\\ \\"!\\""}')
    assert send(page) == predict_with_curl(page) == {"predictions": [[1.5, 1.5], [5.5, 5.5]]}
    choose(page, "several")
    assert send(page) == predict_with_curl(page) == {"predictions": [{"next": 2, "scaled": [1.0, 1.0], "total": 2.0}]}


def test_a_name_from_outside_is_text(server, page):
    """Models with such names cannot be served everywhere, so the page is told of them as /health tells of models."""
    names = ["<script>alert(1)</script>", 'we"ird\n', "__proto__", "a'b"]
    page.evaluate(TELL_OF_MODELS.replace("NAMES", json.dumps(names)))
    assert set(names) <= set(page.evaluate("document.body.dataset.names").split("|"))
    assert page.evaluate("document.querySelector('main img, main script') === null && document.title !== 'hurt'")
    text = r"""'# HELP a b\na{x="we\\"ird}\\n\\\\",y=""} 2.5\nb 1e+06\n'"""
    found = f"[...parseMetrics({text})].map(([name, [its]]) => [name, [...its.labels], its.value])"
    answer = page.evaluate(found)
    assert answer == [["a", [["x", 'we"ird}\n\\'], ["y", ""]], 2.5], ["b", [], 1e6]]


TELL_OF_MODELS = r"""
    fetch(beside("health")).then(answer => answer.json()).then(health => {
        const error = `<img src=x onerror="document.title = 'hurt'">`;
        for (const name of NAMES)
            Object.defineProperty(health.models, name, {value: {version: null, labels: {}, error}, enumerable: true});
        learnHealth(health);
        document.body.dataset.names = [...document.querySelectorAll(".model h3")].map(its => its.textContent).join("|");
    })"""


def test_it_asks_twice_a_second_at_most_and_not_at_all_while_hidden(page):
    time.sleep(3.5)
    sent = [(at, path) for at, path in page.requests() if path != "/dashboard" and not path.startswith("data")]
    assert {path for _, path in sent} >= {"/health", "/metrics"}
    begun = sent[0][0]
    for second, group in itertools.groupby(sent, lambda its: int(its[0] - begun + 0.05)):
        assert len(list(group)) <= 2, (second, sent)
    metadata = [path for _, path in sent if path.endswith("/metadata")]
    assert len(metadata) == len(set(metadata))  # once for each version

    page.set_hidden(True)
    time.sleep(0.5)  # what is under way
    before = len(page.requests())
    time.sleep(2)
    assert len(page.requests()) == before
    page.set_hidden(False)
    wait_until(lambda: len(page.requests()) > before, 5)


def test_one_of_several_processes_behind_a_port_is_told_and_shown_alone(page):
    page.wait_for("past.length > 0")
    text = r"""'ray_tensorflow_process_info{pid="other"} 1\n'"""
    page.evaluate(f"learnMetrics(parseMetrics({text}), performance.now() / 1000)")
    shown = page.text("#several")
    assert shown.startswith("One of several processes") and "other answered too" in shown
    assert page.text("#about").split()[1] in shown and not page.evaluate("document.getElementById('several').hidden")


def test_a_process_of_the_same_number_is_another_one_if_it_was_started_at_another_time(page):
    """As there are in containers, each of which counts from 1."""
    page.wait_for("past.length > 0")
    pid = page.text("#about").split()[1]
    text = rf"""'ray_tensorflow_process_info{{pid="{pid}"}} 1\nprocess_start_time_seconds 5\n'"""
    page.evaluate(f"learnMetrics(parseMetrics({text}), performance.now() / 1000)")
    assert f"those of process {pid}; {pid} answered too" in page.text("#several")


def test_when_the_server_is_back_the_sum_and_the_errors_of_before_are_forgotten(server, page):
    metrics = r"""
        isAsking = true;  // nobody else does from now on
        const told = (started, errors, more) => learnMetrics(parseMetrics(`ray_tensorflow_process_info{pid="1"} 1
process_start_time_seconds ${started}
ray_tensorflow_errors_total{code="404",model="",kind=""} ${errors}
${more}`), performance.now() / 1000);
        const errors = () => [...document.querySelector("#errors tr").cells].map(cell => cell.textContent);
        [shownPid, recent, past] = [null, [], []];
        told(1, 40, "ray_tensorflow_sum 100");
        told(1, 50, "ray_tensorflow_sum 100");
        const found = [errors(), document.getElementById("sum").textContent];
        heardAt = -Infinity;  // as where it does not answer for a while
        told(2, 1, "");
        return [...found, errors(), document.getElementById("sum").textContent]"""
    before, total, after, nothing = page.evaluate(f"(() => {{{metrics}}})()")
    assert before == ["404", "no model", "0", "50"] and total == "100"
    assert after == ["404", "no model", "1", "1"] and nothing == "\N{EN DASH}"


def test_a_version_of_nanoseconds_is_shown_and_asked_for_to_the_last_digit(page):
    version = 1764243389123456789
    model = f'{{"version": {version}, "labels": {{"new": {version}}}, "merged": []}}'
    health = f'{{"status": "ready", "workers": [], "parameter_servers": [], "models": {{"ns": {model}}}}}'
    page.evaluate(f"get = async path => [{{ok: false}}, path === 'health' ? '{health}' : '']; askHealth()")
    page.wait_for("document.querySelector('.model[data-model=ns]') !== null")
    assert str(version) in page.text(".model[data-model=ns]")
    options = page.evaluate("[...document.getElementById('try-version').options].map(its => its.value)")
    assert options == ["", "/labels/new", f"/versions/{version}"]
    asked = []
    for option in options:
        page.type("#try-version", option)
        asked.append(page.evaluate("[choice().path, keyOf('ns', choice().version)]"))
    assert asked == [[f"v1/models/ns{option}", f'["ns","{version}"]'] for option in options]


def test_everything_from_elsewhere_is_forbidden(server, page):
    policy = server.get("/dashboard").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|\burl\(", server.get("/dashboard").body.decode())
    assert page.evaluate("fetch('http://127.0.0.1:1/').then(() => 'reached', error => 'refused')") == "refused"
    page.evaluate("document.body.append(make('script', {}, 'window.ran = 1'))")
    assert page.evaluate("window.ran") is None
    assert len([its for its in page.complaints() if "Content Security Policy" in its]) >= 2
    page.events.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_it_fits_and_can_be_read(page, width, height, scheme):
    page.look_like(width, height, scheme, width < 500)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    contrast = page.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast  # WCAG 2.2, AA


CONTRAST = """(() => {
    const style = getComputedStyle(document.documentElement);
    const canvas = document.createElement("canvas").getContext("2d");
    const luminance = name => {
        canvas.fillStyle = style.getPropertyValue(name);
        const parts = canvas.fillStyle.match(/[0-9a-f]{2}/g).map(part => parseInt(part, 16) / 255);
        const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const pairs = ["ink card", "soft card", "soft page", "bad card", "good good-bg", "warn warn-bg", "bad bad-bg",
        "ink flash", "on-accent accent", ...[0, 1, 2, 3, 4, 5, 6, 7].map(n => `c${n} card`)];
    return Object.fromEntries(pairs.map(pair => {
        const [a, b] = pair.split(" ").map(name => luminance("--" + name)).sort((a, b) => b - a);
        return [pair, (a + 0.05) / (b + 0.05)];
    }));
})()"""

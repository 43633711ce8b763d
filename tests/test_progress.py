"""What is shown of a long job: a bar on a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import REPOSITORY

JOB = """
import logging, sys, time
from shared_graph.progress import shown_progress
logging.basicConfig(format="%(message)s", stream=sys.stderr)
with shown_progress(2000, "rows") as advance:
    for part in range(20):
        time.sleep(0.02)
        advance(100)
        if part == 10: logging.warning("worker 1 lost")
"""


def on_a_terminal(script: str, columns: int = 100) -> str:
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, columns))
    environment = os.environ | {"PYTHONPATH": REPOSITORY}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=its, env=environment)
    os.close(its)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how a terminal says that nobody writes any more
        pass
    finally:
        os.close(ours)
    assert process.wait(30) == 0
    return shown.decode()


@pytest.mark.parametrize("columns", [100, 0], ids=["100 columns", "unknown width"])
def test_a_terminal_has_a_bar_with_rows_rate_and_time_left_and_whole_log_lines(columns):
    shown = on_a_terminal(JOB, columns)
    assert re.search(r"\r100% \|█+\| 2000/2000 rows  [\d.]+ rows/s  00:00 left", shown), shown
    assert re.search(r"worker 1 lost\r?\n", shown)


def test_elsewhere_lines_are_plain():
    environment = os.environ | {"PYTHONPATH": REPOSITORY}
    run = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, env=environment, timeout=30)
    first, *rest = run.stderr.splitlines()
    assert re.fullmatch(r"100/2000 rows  \d+ rows/s  \d+ s left", first)
    assert rest[0] == "worker 1 lost" and re.fullmatch(r"2000/2000 rows  \d+ rows/s  0 s left", rest[1]), rest

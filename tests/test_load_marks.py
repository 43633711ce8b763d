"""A model that ends the process that loads it is known afterwards, and takes nothing with it."""

import json
import os
import subprocess
import sys

from conftest import REPOSITORY

LIFE = """
import asyncio, json, os, sys
from shared_graph.errors import ModelError
from shared_graph.load_marks import LoadMarks
from shared_graph.models import ModelKey

folder, models, bad, files = json.loads(sys.argv[1])
marks = LoadMarks(folder, "run")

async def load(name):
    try:
        async with marks.loading(ModelKey(name, 1), files):
            await asyncio.sleep(0.05)
            if name in bad:
                os._exit(7)
            return "loaded"
    except ModelError as error:
        return str(error)

async def main():
    return dict(zip(models, await asyncio.gather(*map(load, models))))

print(json.dumps(asyncio.run(main())))
"""
ENDED = "it has ended the process that loads it 3 times"
MODELS = ["first", "bad", "last"]


def live(folder, bad=("bad",), files=(("saved_model.pb", 1, 0.5),), models=MODELS) -> dict[str, str] | None:
    """What becomes of models that a process loads all at once; None: that was its end."""
    command = [sys.executable, "-c", LIFE, json.dumps([str(folder), models, bad, files])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 7), done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else None


def test_a_model_that_always_ends_its_process_is_not_tried_again_until_its_files_change_and_the_others_are(tmp_path):
    lives = [live(tmp_path) for _ in range(4)]  # together with others; then alone; then alone again
    assert lives[:3] == [None] * 3 and lives[3] == {"first": "loaded", "bad": ENDED, "last": "loaded"}
    assert live(tmp_path) == lives[3], "it is remembered"
    assert live(tmp_path, bad=(), files=[("saved_model.pb", 2, 1.5)]) == dict.fromkeys(MODELS, "loaded")
    assert os.listdir(tmp_path) == [], "marks go with what they are for"
    assert live(tmp_path, bad=()) == dict.fromkeys(MODELS, "loaded"), "nothing is held against it any more"


def test_a_function_whose_graph_can_be_built_and_that_ends_its_process_when_it_is_loaded_is_found_out(tmp_path):
    """It is marked twice in each life: see ``Loader.build_functions``."""
    twice = LIFE.replace("gather(*map(load, models))", "gather(built())").replace("async def main", BUILT)
    lives = []
    for _ in range(4):
        command = [sys.executable, "-c", twice, json.dumps([str(tmp_path), ["bad"], ["bad"], []])]
        lives.append(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60))
    assert [life.returncode for life in lives] == [7, 7, 7, 0]
    assert json.loads(lives[3].stdout) == {"bad": ENDED}


BUILT = """async def built():
    try:
        async with marks.loading(ModelKey("bad", 1), files):
            pass
    except ModelError:
        pass
    return await load("bad")

async def main"""


def test_a_model_that_has_ended_its_process_once_is_loaded_the_next_time(tmp_path):
    assert live(tmp_path, models=["bad"]) is None
    assert live(tmp_path, bad=()) == dict.fromkeys(MODELS, "loaded")


def test_two_that_end_their_process_are_both_found_out(tmp_path):
    lives = [live(tmp_path, bad=["bad", "last"]) for _ in range(6)]  # all; then each alone, twice
    assert lives == [None] * 5 + [{"first": "loaded", "bad": ENDED, "last": ENDED}]

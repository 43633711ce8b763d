"""A module that is imported by workers since its model needs operations of a library, and ends them."""

import os

import bad_models
from conftest import command_of

if command_of(os.getpid()).startswith("ray::Worker"):
    os._exit(7)


def ends_workers(tf):
    return bad_models.with_operations(tf)

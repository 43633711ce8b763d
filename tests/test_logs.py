"""The address that a program listens on, and its log lines."""

import socket
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from shared_graph.logs import listen


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
@pytest.mark.parametrize(
    "host, addresses", [("::", ["::1", "127.0.0.1"]), ("::1", ["::1"]), ("0.0.0.0", ["127.0.0.1"])]
)
def test_any_address_of_the_newer_kind_is_any_of_the_older_one_too(host, addresses):
    with listen(host, 0) as listener:
        for address in addresses:
            socket.create_connection((address, listener.getsockname()[1]), 5).close()


TWO_LOGS = """
import logging
from shared_graph.logs import show_log
show_log()
logging.basicConfig()
logging.getLogger("shared_graph.batcher").info("once")
"""


def test_a_line_is_shown_once_whoever_sets_up_the_root_logger_afterwards():
    done = subprocess.run([sys.executable, "-c", TWO_LOGS], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stderr.count("once") == 1

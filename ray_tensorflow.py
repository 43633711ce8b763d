"""The sum of the workers' numbers in one shared graph, or a whole file predicted.

    python ray_tensorflow.py                                                     # worker i adds i to the shared sum
    python ray_tensorflow.py --model DIR --input x.npy --output y.npy            # predict each row of a file

The library is in ``shared_graph``; ``ray_tensorflow_flask.py`` and ``ray_tensorflow_starlette.py`` serve over HTTP.
"""

import asyncio
import os
import signal
import sys
import time

from shared_graph.cluster import Cluster
from shared_graph.errors import Error
from shared_graph.files import check_files, predict_file, with_one_version
from shared_graph.logs import counted, start_program
from shared_graph.options import COMMAND, Options


async def run_command(options: Options) -> int:
    """Worker i adds the value i, all at once; or a file is predicted. The exit status: 128 + n after signal n."""
    ended_by, is_closing = [], False

    def end(number: int, task: asyncio.Task) -> None:
        if not is_closing:  # which nothing is to cut short
            ended_by.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number, asyncio.current_task())
    cluster, started = Cluster(options), time.monotonic()

    async def add(worker: int) -> None:
        started = time.monotonic()
        total = await cluster.add_async(worker, worker)
        print(f"worker {worker}: added {worker}, sum {total}, {time.monotonic() - started:.3f} s", flush=True)

    try:
        await asyncio.to_thread(cluster.start, options.workers)
        print(f"started: {counted(options.workers, 'worker')}, {time.monotonic() - started:.1f} s", flush=True)
        if options.input:
            await asyncio.to_thread(predict_file, cluster, options.model[0].name, options.input, options.output)
        else:
            await asyncio.gather(*map(add, range(options.workers)))
            print(f"sum: {await cluster.add_async(0)}", flush=True)
        return 0
    except asyncio.CancelledError:
        return 128 + ended_by[0]
    finally:
        is_closing = True
        await asyncio.to_thread(cluster.close)


def main() -> None:
    options = Options.from_command_line("Add the workers' numbers up in one shared graph, or predict a file.", COMMAND)
    start_program()
    try:
        if options.input:
            check_files(options.input, options.output)
            options = with_one_version(options)
        sys.exit(asyncio.run(run_command(options)))
    except (Error, OSError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


if __name__ == "__main__":
    main()

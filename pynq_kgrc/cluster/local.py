"""Starts Ray on this machine or connects to a running cluster, and always shuts it down."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

from pynq_kgrc.errors import DeviceError

STORE_BYTES = 100_000_000
"""Size of Ray's shared memory, in bytes: a row of results has a few kB."""


@contextlib.contextmanager
def ray_started(
    cpus: int, address: str = "local", store_bytes: int = STORE_BYTES
) -> Iterator[None]:
    """Ray without telemetry, dashboard and log; it is shut down when the block ends.

    In the block, standard output goes to standard error, because Ray prints too.

    Args:
        cpus: number of workers; Ray counts them, it does not pin them to cores.
        address: of a running cluster, or "local".
        store_bytes: size of Ray's shared memory on this machine.

    Raises:
        DeviceError: Ray does not start.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {
        "configure_logging": False,
        "log_to_driver": False,
        "include_dashboard": None,
    }
    with contextlib.ExitStack() as stack:
        # Ray prints messages about workers that died; only results go to standard output
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if address == "local":
            quiet.update(
                include_dashboard=False,
                num_cpus=cpus,
                object_store_memory=store_bytes,
                _node_ip_address="127.0.0.1",
                _temp_dir=stack.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix="kgrc-", dir=_short_folder(), ignore_cleanup_errors=True
                    )
                ),
            )
        stack.callback(ray.shutdown)
        try:
            for name in ("ray", "ray.data", "ray.serve"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            ray.init(address=address, **quiet)
        except Exception as error:
            raise DeviceError(f"Ray does not start: {error}") from error
        yield


def _short_folder() -> str:
    """A temporary folder with a short path: a Unix socket's path has at most 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 25 else "/tmp"

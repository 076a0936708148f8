"""Ray itself: started here, or joined where it runs already, and always left again."""

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
"""Of Ray's shared memory: a row of results has some kB."""


@contextlib.contextmanager
def ray_started(
    cpus: int, address: str = "local", store_bytes: int = STORE_BYTES
) -> Iterator[None]:
    """Ray without telemetry, dashboard or noise; ended however the block ends. In the block what
    is printed goes to standard error, because Ray prints too.

    Args:
        cpus: how many workers there may be; Ray counts them, it does not tie them to cores.
        address: of a cluster that runs already, or "local".
        store_bytes: of Ray's shared memory here.

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
        # what Ray has to say of a worker that died is no result
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
    """A folder for Ray's sockets, whose paths may have 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 25 else "/tmp"

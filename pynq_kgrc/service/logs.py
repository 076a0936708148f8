"""Structured logging: one JSON object per line on standard error.

No keys, headers or query strings are logged, because they may contain a key. uvicorn's lines about
WebSockets have the query string; they are left out, and the guard has a line for each.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; the names in `extra` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line.update((k, v) for k, v in vars(record).items() if k not in _PLAIN)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: int = logging.INFO) -> None:
    """Send the logs of the service and of uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: '"WebSocket %s"' not in str(record.msg))
    for name in ("pynq_kgrc.service", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    # python_multipart logs malformed forms, which are errors of clients
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

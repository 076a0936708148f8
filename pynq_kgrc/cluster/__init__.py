"""Scale-out over Ray. What Ray reads when it is imported is said here, before anything of it is."""

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# a thread that comes too late must not start Ray again, its own way
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

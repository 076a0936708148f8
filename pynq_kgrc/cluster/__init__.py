"""Scale-out over Ray. Ray reads these environment variables when it is imported."""

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# a thread that calls Ray after its end must not start a new Ray
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

"""The service: videos in, actions out, over HTTP. `app.py` is where to begin reading.

One process answers clients and holds no network; `worker.py` runs in a process of its own and owns
the device; `decode.py` runs in another, from which every upload gets a child with hard limits.
"""

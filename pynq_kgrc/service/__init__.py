"""The HTTP service that recognizes actions in videos. Start reading at `app.py`.

One process answers clients and loads no network. `worker.py` runs in processes of its own, which
own the device. `decode.py` runs in another process, which forks a child with resource limits for
every upload.
"""

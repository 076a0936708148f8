"""One session under many hands: threads, forks, pools and servers get the answers of their clips.

The judge is a session that nobody shares. Wrong labels without an error are what must not happen.
"""

import asyncio
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from networks import Net, compiled

from pynq_kgrc.backends.base import open_backend
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.native.backend import Native
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.runtime import Session, compare

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120


@functools.cache
def made():
    net = Net(size=(4, 8, 8))
    net.conv(net.conv("clip", 8), 8)
    net.conv("conv1", 6, kernel=(4, 8, 8), pad=0)
    program, _ = compiled(net)
    rng = np.random.default_rng(0)
    shape = (program.clip.frames, program.clip.height, program.clip.width, 3)
    clips = [rng.integers(0, 256, shape).astype(np.uint8) for _ in range(4)]
    with Session(program, Emulation(program.config, cores=1)) as session:
        right = [answer(session, clip) for clip in clips]
    assert len({tuple(logits) for logits in right}) == len(right)
    return program, clips, right


def answer(session, clip):
    return session.run(clip).logits.tolist()


BACKENDS = {
    "emulate": lambda config: Emulation(config, cores=1),
    "threads": lambda config: Emulation(config, cores=2, fork=False),
    "processes": lambda config: Emulation(config, cores=2, fork=True),
    "native": lambda config: Native(config, cores=2),
    "csim": lambda config: open_backend("csim", config),
    "board": lambda config: open_backend("board", config),
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "board":
        pytest.importorskip("pynq", reason="no pynq: board not tested")
        monkeypatch.setenv("PYNQ_KGRC_SIMULATE", "1")
    program, _, _ = made()
    opened = BACKENDS[request.param](program.config)
    yield opened
    opened.close()


def in_threads(count, work):
    """What `work(0)` to `work(count - 1)` return, all begun at the same moment."""
    gate = threading.Barrier(count)

    def begin(number):
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_threads_get_the_labels_of_their_own_clips(backend):
    program, clips, right = made()
    with Session(program, backend) as session:

        def work(number):
            return [answer(session, clips[number]) for _ in range(10)]

        for number, found in enumerate(in_threads(len(clips), work)):
            assert found == [right[number]] * 10


def test_sessions_that_share_a_backend(backend):
    program, clips, right = made()
    first, second = Session(program, backend), Session(program, backend)

    def work(number):
        return [answer((first, second)[number % 2], clips[number]) for _ in range(5)]

    for number, found in enumerate(in_threads(len(clips), work)):
        assert found == [right[number]] * 5


def test_backends_of_one_design_in_two_threads(backend):
    """The C-simulation's library has one state for the whole process."""
    if backend.name == "board":
        pytest.skip("a device is for one backend at a time")
    program, clips, right = made()

    def work(number):
        with Session(program, type(backend)(program.config)) as session:
            return [answer(session, clips[number]) for _ in range(5)]

    for number, found in enumerate(in_threads(len(clips), work)):
        assert found == [right[number]] * 5


def test_many_clips_have_the_bits_of_one_by_one(backend):
    """Each thread with clips of its own; two sessions take turns at loading the program."""
    program, clips, right = made()
    first, second = Session(program, backend), Session(program, backend)

    def work(number):
        order = [(number + i) % len(clips) for i in range(6)]
        pairs = (first, second)[number % 2].run_many(order, lambda place: clips[place])
        return [scores.logits.tolist() == right[place] for place, scores in pairs]

    assert work(0) == [True] * 6
    assert in_threads(4, work) == [[True] * 6] * 4
    assert "next clip" not in {thread.name for thread in threading.enumerate()}


def test_a_fork_in_the_middle_of_many_clips(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        many = session.run_many(clips)
        assert next(many)[1].logits.tolist() == right[0]

        def go_on():
            with pytest.raises(DeviceError, match="which began to run these clips"):
                next(many)
            return [scores.logits.tolist() for _, scores in session.run_many(clips)]

        assert_right(forked(go_on), right)
        assert [scores.logits.tolist() for _, scores in many] == right[1:]


def test_a_trace_goes_on_while_others_classify(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        alone = [(name, codes.copy()) for name, codes, _ in session.trace(clips[0])]
        done = threading.Event()

        def disturb():
            found = []
            while not done.is_set():
                found.append(answer(session, clips[1]) == right[1])
            return found

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(disturb)
            try:
                for _ in range(5):
                    for (name, codes, _), (wanted, whole) in zip(
                        session.trace(clips[0]), alone, strict=True
                    ):
                        assert name == wanted
                        np.testing.assert_array_equal(codes, whole)
            finally:
                done.set()
            assert all(other.result(LIMIT))


def test_a_trace_interleaved_with_a_run_in_one_thread(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        alone = [codes for _, codes, _ in session.trace(clips[0])]
        for (_, codes, _), whole in zip(session.trace(clips[0]), alone, strict=True):
            np.testing.assert_array_equal(codes, whole)
            assert answer(session, clips[1]) == right[1]


def test_a_session_opened_in_the_middle_of_a_trace(backend):
    """Loading a program, even the same one, leaves no maps to go on from."""
    program, clips, _ = made()
    with Session(program, backend) as session:
        alone = [codes for _, codes, _ in session.trace(clips[0])]
        for (_, codes, _), whole in zip(session.trace(clips[0]), alone, strict=True):
            np.testing.assert_array_equal(codes, whole)
            Session(program, backend)


def test_compare_of_two_sessions_on_one_backend(backend):
    program, clips, _ = made()
    assert compare(Session(program, backend), Session(program, backend), clips[0]) is None


def test_asyncio_to_thread(backend):
    program, clips, right = made()

    async def ask(session):
        jobs = [asyncio.to_thread(answer, session, clip) for clip in clips * 3]
        return await asyncio.gather(*jobs)

    with Session(program, backend) as session:
        assert asyncio.run(ask(session)) == right * 3


def forked(work, limit=LIMIT):
    """What `work` returns in a child of a plain fork, or the name of the error it raises."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                found = repr(work())
            except DeviceError:
                found = "DeviceError"
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            os.write(write_end, found.encode())
        finally:
            os._exit(0)
    os.close(write_end)
    alarm = threading.Timer(limit, os.kill, (child, signal.SIGKILL))
    alarm.start()
    with os.fdopen(read_end, "rb") as pipe:
        found = pipe.read().decode()
    alarm.cancel()
    os.waitpid(child, 0)
    return found


def assert_right(found, right):
    assert found in (repr(right), "DeviceError"), found


def test_a_forked_child_and_its_parent(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        assert answer(session, clips[0]) == right[0]
        for _ in range(2):
            assert_right(forked(lambda: [answer(session, clip) for clip in clips]), right)
            assert [answer(session, clip) for clip in clips] == right


def test_child_and_parent_at_the_same_time(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        answer(session, clips[0])

        def child():
            return [answer(session, clip) for clip in clips * 5]

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: [answer(session, clip) for clip in clips * 5])
            found = forked(child)
            assert other.result(LIMIT) == right * 5
        assert_right(found, right * 5)


def test_a_fork_while_another_thread_runs(backend):
    """The child must not wait for a lock that a thread held which it does not have."""
    program, clips, right = made()
    with Session(program, backend) as session:
        stop = threading.Event()

        def disturb():
            while not stop.is_set():
                answer(session, clips[1])

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(disturb)
            try:
                for _ in range(3):
                    assert_right(forked(lambda: answer(session, clips[0]), 60), right[0])
            finally:
                stop.set()
            other.result(LIMIT)


def test_a_child_that_closes_leaves_the_parent_whole(backend):
    program, clips, right = made()
    with Session(program, backend) as session:
        answer(session, clips[0])
        assert forked(lambda: backend.close()) in ("None", "DeviceError")
        assert answer(session, clips[0]) == right[0]


def test_a_trace_that_began_before_a_fork(backend):
    program, clips, _ = made()
    with Session(program, backend) as session:
        alone = [codes.tolist() for _, codes, _ in session.trace(clips[0])]
        steps = session.trace(clips[0])
        next(steps)
        assert_right(forked(lambda: [codes.tolist() for _, codes, _ in steps]), alone[1:])
        assert [codes.tolist() for _, codes, _ in steps] == alone[1:]


shared_session = None


def pool_task(number):
    _, clips, _ = made()
    try:
        return answer(shared_session, clips[number])
    except DeviceError:
        return "DeviceError"


def test_multiprocessing_pool(backend):
    global shared_session
    program, clips, right = made()
    with Session(program, backend) as session:
        answer(session, clips[0])
        shared_session = session
        with multiprocessing.get_context("fork").Pool(2) as pool:
            found = pool.map_async(pool_task, [*range(len(clips))] * 2, chunksize=1).get(LIMIT)
        for mine, wanted in zip(found, right * 2, strict=True):
            assert mine in (wanted, "DeviceError")
        assert answer(session, clips[0]) == right[0]


def test_workers_of_a_torch_data_loader(backend):
    torch = pytest.importorskip("torch", reason="no torch: DataLoader not tested")
    program, clips, right = made()

    class Labelled(torch.utils.data.Dataset):
        def __init__(self, session):
            self.session = session

        def __len__(self):
            return len(clips)

        def __getitem__(self, number):
            try:
                return torch.tensor(answer(self.session, clips[number]), dtype=torch.float64)
            except DeviceError:
                return torch.full((len(right[0]),), torch.nan, dtype=torch.float64)

    with Session(program, backend) as session:
        answer(session, clips[0])
        loader = torch.utils.data.DataLoader(
            Labelled(session),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            timeout=LIMIT,
        )
        for found, wanted in zip(loader, right, strict=True):
            assert found.isnan().all() or found.tolist() == wanted
        assert answer(session, clips[0]) == right[0]


def test_a_session_is_not_pickled():
    """A spawned process would get a device that is not its own."""
    import pickle

    program, _, _ = made()
    with Session(program) as session, pytest.raises(ProgramError, match="open a session in each"):
        pickle.dumps(session)


def test_gunicorn_preload(tmp_path):
    """The application, with its session, is loaded before the workers are forked."""
    pytest.importorskip("gunicorn", reason="no gunicorn: preloading not tested")
    (tmp_path / "app.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT / "host_tests")!r})
            import json, os
            from test_threads_and_forks import answer, made
            from pynq_kgrc.backends.emulation.backend import Emulation
            from pynq_kgrc.runtime import Session
            program, clips, right = made()
            session = Session(program, Emulation(program.config, cores=2, fork=True))
            assert answer(session, clips[0]) == right[0]
            def app(environ, start_response):
                number = int(environ["QUERY_STRING"])
                found = [os.getpid(), answer(session, clips[number]) == right[number]]
                start_response("200 OK", [("Content-Type", "application/json")])
                return [json.dumps(found).encode()]
            """
        )
    )
    address = tmp_path / "port"
    (tmp_path / "conf.py").write_text(
        f"def when_ready(server):\n"
        f"    port = server.LISTENERS[0].sock.getsockname()[1]\n"
        f"    open({str(address)!r} + '.part', 'w').write(str(port))\n"
        f"    import os; os.rename({str(address)!r} + '.part', {str(address)!r})\n"
    )
    command = [sys.executable, "-m", "gunicorn", "--preload", "-w", "2", "--threads", "2"]
    command += ["-b", "127.0.0.1:0", "-c", "conf.py", "app:app"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    server = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            if address.exists():
                break
            assert server.poll() is None
            threading.Event().wait(0.1)
        url = f"http://127.0.0.1:{address.read_text()}/?"

        def ask(number):
            with urllib.request.urlopen(url + str(number % 4), timeout=60) as reply:
                import json

                return json.loads(reply.read())

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(40)))
        assert all(right for _, right in found)
    finally:
        server.terminate()
        server.wait(30)

"""The server: throttle, draining, time limit of a client that does not read, and Retry-After."""

import asyncio
import contextlib
import socket

import pytest

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from pynq_kgrc.service import jobs
from pynq_kgrc.service.guard import client_of
from pynq_kgrc.service.jobs import Admission, Jobs
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.server import REQUESTS_PER_TURN, listen, make_server
from pynq_kgrc.service.settings import Settings

BODY = bytes(40_000)
POST = b"POST /work HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(app, settings=None):
    """A server of this application, and its port."""
    bound = listen("127.0.0.1", 0)
    server = make_server(app, settings or Settings())
    running = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server, bound.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, 20)


async def answer(scope, receive, send):
    """An application that reads the body and answers."""
    if scope["method"] == "POST":
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        assert size == len(BODY)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_burst_of_bodies_does_not_delay_a_health_check():
    """All requests are sent before the server reads; the GET comes last."""
    clients, order = 200, []

    async def app(scope, receive, send):
        order.append(scope["path"])
        await answer(scope, receive, send)

    async def run():
        async with serving(app) as (_, port), contextlib.AsyncExitStack() as lines:
            for request in [POST] * clients + [GET]:
                line = lines.enter_context(contextlib.closing(socket.socket()))
                line.connect(("127.0.0.1", port))
                line.sendall(request)
            while len(order) <= clients:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(order) == clients + 1
    # it is answered soon after it is accepted; before that a few requests proceed per iteration
    assert order.index("/health") <= clients // 32 * REQUESTS_PER_TURN + 3 * REQUESTS_PER_TURN


def test_requests_in_the_throttle_are_answered_at_shutdown():
    """The server shuts down in the iteration of the loop in which they arrive."""
    clients = 3 * REQUESTS_PER_TURN

    async def run():
        async with serving(answer) as (server, port):
            lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
            while len(server.server_state.connections) < clients:
                await asyncio.sleep(0.01)
            for _, writer in lines:
                writer.write(POST)
            waiting = []
            while not waiting:
                await asyncio.sleep(0)
                waiting = [c for c in server.server_state.connections if c._held_data]
            assert len(waiting) > REQUESTS_PER_TURN
            for connection in list(server.server_state.connections):
                connection.shutdown()
            for reader, writer in lines:
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
                writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_client_that_does_not_read_its_answer_is_disconnected():
    sent = 0

    async def app(scope, receive, send):
        nonlocal sent
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done() and sent < 1 << 30:
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
            sent += 1 << 20
            await asyncio.sleep(0)

    async def run():
        async with serving(app, Settings(send_seconds=0.5)) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
            writer.write(GET)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            while server.server_state.connections:  # asyncio reads no more than its limit
                await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sent < 1 << 28


def test_a_websocket_is_not_cut_by_the_time_limit_of_a_header():
    connect = pytest.importorskip("websockets.asyncio.client").connect

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

    async def run():
        async with (
            serving(app, Settings(header_seconds=0.2)) as (_, port),
            connect(f"ws://127.0.0.1:{port}/") as client,
        ):
            for word in ("one", "two", "three"):
                await asyncio.sleep(0.5)
                await client.send(word)
                assert await asyncio.wait_for(client.recv(), 10) == word

    asyncio.run(asyncio.wait_for(run(), 60))


def open_jobs(path):
    return Jobs(path, Admission(2, "videos"), 1, 60, 3600)


def damage_file(path):
    path.write_bytes(b"noise, long enough for the header of a database" * 400)


def damage_document(path):
    with contextlib.closing(open_jobs(path)) as made:
        made._store.execute("INSERT INTO jobs VALUES ('a', 'running', 0, '{\"id\": 3}', NULL)")


def damage_page(path):
    with contextlib.closing(open_jobs(path)) as made:
        for i in range(300):
            made._store.execute(
                "INSERT INTO jobs VALUES (?, 'done', 0, ?, NULL)", (str(i), bytes(500))
            )
    content = bytearray(path.read_bytes())
    content[5 * 4096 : 9 * 4096] = b"\x55" * (4 * 4096)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_file, damage_document, damage_page])
def test_a_damaged_database_of_jobs_is_set_aside(tmp_path, caplog, damage):
    path = tmp_path / "jobs.sqlite"
    damage(path)
    with contextlib.closing(open_jobs(path)) as found, pytest.raises(Refusal, match="no job 'a'"):
        found.find("a")
    assert "was damaged" in caplog.text
    assert (tmp_path / "jobs.sqlite.damaged").stat().st_size > 0
    caplog.clear()
    open_jobs(path).close()
    assert not caplog.text


def test_a_damaged_result_is_not_found(tmp_path, caplog):
    with contextlib.closing(open_jobs(tmp_path / "jobs.sqlite")) as found:
        row = ("a", "done", jobs.now(), b"{")
        found._store.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, NULL)", row)
        with pytest.raises(Refusal, match="'a' is damaged; send it again"):
            found.find("a")
    assert "damaged" in caplog.text


def test_jobs_of_an_earlier_release_are_found(tmp_path):
    path = tmp_path / "jobs.sqlite"
    done = jobs.Job()
    with contextlib.closing(jobs.sqlite3.connect(path, isolation_level=None)) as old:
        old.execute(
            "CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT, created REAL, document BLOB)"
        )
        document = jobs.msgspec.json.encode(done.document())
        old.execute("INSERT INTO jobs VALUES (?, 'done', ?, ?)", ("a", jobs.now(), document))
    with contextlib.closing(open_jobs(path)) as found:
        assert found.find("a")[0].id == done.id
        with pytest.raises(Refusal, match="no job 'a'"):
            found.find("a", "alice")


def test_a_key_sees_its_own_jobs(tmp_path):
    with contextlib.closing(open_jobs(tmp_path / "jobs.sqlite")) as found:
        made = {owner: jobs.Job(owner) for owner in ("alice", "bob", None)}
        for job in made.values():
            found.keep(job)
        for owner in ("alice", "bob"):
            assert [row.id for row in found.listed(owner)] == [made[owner].id]
        assert len(found.listed(None)) == 3
        assert found.find(made["alice"].id, "alice")[0].id == made["alice"].id
        for hidden in (made["bob"], made[None]):
            with pytest.raises(Refusal, match="no job"):
                found.find(hidden.id, "alice")
            with pytest.raises(Refusal, match="no job"):
                found.cancel(hidden.id, "alice")


def test_results_outlive_a_jump_of_the_clock(tmp_path, monkeypatch):
    """A board without a battery sets its clock when it finds a network."""
    with contextlib.closing(open_jobs(tmp_path / "jobs.sqlite")) as found:
        job = jobs.Job()
        job.state = "done"
        found.keep(job)
        wall = jobs.time.time()
        monkeypatch.setattr(jobs.time, "time", lambda: wall + 3 * 3600)
        assert found.find(job.id)[0].state == "done"
        found.keep(jobs.Job())
        assert found.find(job.id)[0].state == "done"


def test_retry_after_grows_so_that_clients_do_not_return_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now)
    queue = Admission(2, "videos")
    for _ in range(100):  # each takes 4 s: a place becomes free every 2 s
        with queue.enter(""):
            now += 4.0

    def refused():
        with pytest.raises(Refusal) as caught:
            queue.check("")
        return int(caught.value.headers["retry-after"])

    with queue.enter(""), queue.enter(""):
        assert [refused() for _ in range(4)] == [2, 4, 6, 8]
        now += 6.0
        assert refused() == 4
        for _ in range(100):
            assert refused() <= 60
        now += 1000.0
        assert refused() == 2
    queue.check("")


def test_one_client_cannot_take_the_last_places():
    """Of 16 places the last 4 are for clients that hold less than 2; this machine may take all."""
    queue = Admission(16, "uploads")
    with contextlib.ExitStack() as held:
        for _ in range(12):
            held.enter_context(queue.enter("192.0.2.1"))
        with pytest.raises(Refusal, match="12 uploads of your address") as refused:
            queue.check("192.0.2.1")
        assert refused.value.status == 429
        for address in ("192.0.2.2", "192.0.2.2", "192.0.2.3"):
            held.enter_context(queue.enter(address))
        with pytest.raises(Refusal, match="2 uploads of your address"):
            queue.check("192.0.2.2")
        held.enter_context(queue.enter(""))
        with pytest.raises(Refusal, match="16 uploads are the most"):
            queue.check("192.0.2.3")
    queue.check("192.0.2.1")
    assert not queue._held


def test_clients_of_this_machine_have_no_address():
    assert client_of({"client": ("192.0.2.1", 5)}) == "192.0.2.1"
    assert client_of({"client": ("2001:db8::1", 5)}) == "2001:db8::1"
    for scope in ({"client": ("127.0.0.2", 5)}, {"client": ("::1", 5)}, {"client": None}, {}):
        assert client_of(scope) == ""

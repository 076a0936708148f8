"""What stands between uvicorn and the service: who is let in when, and who is gone."""

import asyncio
import contextlib
import socket

import pytest

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from pynq_kgrc.service import jobs
from pynq_kgrc.service.jobs import Admission
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
    """An application that takes the body and answers."""
    if scope["method"] == "POST":
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        assert size == len(BODY)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_crowd_with_bodies_does_not_keep_a_question_waiting():
    """All have written before the server looks; the one that only asks comes last."""
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
    # it is heard as soon as it is accepted: after a few turns, in each of which a few were let in
    assert order.index("/health") <= clients // 32 * REQUESTS_PER_TURN + 3 * REQUESTS_PER_TURN


def test_who_is_at_the_door_when_the_service_ends_is_answered():
    """The end comes in the very turn in which they arrive."""
    clients = 3 * REQUESTS_PER_TURN

    async def run():
        async with serving(answer) as (server, port):
            lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
            while len(server.server_state.connections) < clients:
                await asyncio.sleep(0.01)
            for _, writer in lines:
                writer.write(POST)
            at_door = []
            while not at_door:
                await asyncio.sleep(0)
                at_door = [c for c in server.server_state.connections if c._held_data]
            assert len(at_door) > REQUESTS_PER_TURN
            for connection in list(server.server_state.connections):
                connection.shutdown()
            for reader, writer in lines:
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
                writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_client_that_does_not_read_its_answer_is_gone():
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


def test_those_who_are_refused_do_not_all_come_back_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now)
    queue = Admission(2, "videos")
    for _ in range(100):  # each is inside for 4 s: a place gets free every 2
        with queue.enter():
            now += 4.0

    def refused():
        with pytest.raises(Refusal) as caught:
            queue.check()
        return int(caught.value.headers["retry-after"])

    with queue.enter(), queue.enter():
        assert [refused() for _ in range(4)] == [2, 4, 6, 8]
        now += 6.0
        assert refused() == 4
        for _ in range(100):
            assert refused() <= 60
        now += 1000.0
        assert refused() == 2
    queue.check()

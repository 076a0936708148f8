"""Requests that the gateway passes on to a device over HTTP: whole answers, events, live sessions.

The id of a job is `DEVICE.ID` for the gateway's clients, where the device calls it `ID`: so every
request about a job finds the device that took it, and the gateway has nothing to remember.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import aiohttp
import msgspec
from starlette.websockets import WebSocket
from yarl import URL

from pynq_kgrc.service.keys import KEY_PROTOCOL
from pynq_kgrc.service.live import refuse_live
from pynq_kgrc.service.refusal import Refusal

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 40.0
"""A stream of events without a byte for this time has ended; the boards send one each 10 s."""
HEARTBEAT_SECONDS = 20.0
"""A device that does not answer a ping of a live session within half of this time is gone."""
KEYS = ("authorization", "x-api-key")
PASSED_ON = (
    *("content-type", "content-encoding", "accept-encoding", "inference-header-content-length"),
    *("prefer", *KEYS),
)
"""Headers of the client that are passed on: the boards check its key themselves."""
PASSED_BACK = (
    *("content-type", "content-encoding", "inference-header-content-length", "retry-after"),
    *("location", "allow", "cache-control", "vary", "www-authenticate"),
)
"""Headers of the board's answer that are passed back."""
MAX_REPLY = 50_000_000
"""Largest answer of a board, in bytes."""
MAX_MESSAGE = 1 << 20
"""Largest message of a board in a live session, in bytes."""
UNREACHABLE = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""What a request to a device that cannot be reached raises."""


class Reply(NamedTuple):
    """The answer of a device."""

    status: int
    headers: dict[str, str]
    body: bytes


def no_answer(why: str) -> Reply:
    """The reply in place of a device that does not answer."""
    return Reply(503, {}, json.dumps({"error": why}).encode())


def new_client(seconds: float) -> aiohttp.ClientSession:
    """An HTTP client whose requests have this time limit; it needs a running event loop."""
    return aiohttp.ClientSession(
        timeout=_limit(seconds),
        auto_decompress=False,
        skip_auto_headers=("accept-encoding", "content-type"),
    )


def _limit(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)


async def ask(
    client: aiohttp.ClientSession,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    seconds: float | None = None,
) -> Reply:
    """The whole answer of a device; `seconds` is its time limit if it is not that of the client.

    Raises:
        aiohttp.ClientError, OSError, asyncio.TimeoutError: it cannot be reached.
    """
    async with client.request(
        method,
        URL(url, encoded=True),
        data=body or None,
        headers=dict(headers or {}),
        allow_redirects=False,
        timeout=client.timeout if seconds is None else _limit(seconds),
    ) as answer:
        text = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            text += chunk
            if len(text) > MAX_REPLY:
                return no_answer(f"{url}: an answer of more than {MAX_REPLY} bytes")
        heads = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(answer.status, heads, bytes(text))


def named(device: str, reply: Reply) -> Reply:
    """An answer about a job of a device with the job's id for the gateway's clients."""
    headers = dict(reply.headers)
    if "location" in headers:
        headers["location"] = headers["location"].replace("/v1/jobs/", f"/v1/jobs/{device}.", 1)
    return reply._replace(headers=headers, body=_named(device, reply.body))


def _named(device: str, body: bytes) -> bytes:
    """A job's document with its id for the gateway's clients; another body as it is."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body
    if not isinstance(document, dict) or not isinstance(document.get("id"), str):
        return body
    return msgspec.json.encode({**document, "id": f"{device}.{document['id']}"})


async def events(device: str, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The server-sent events of a job, as they arrive, with its id for the gateway's clients.

    Ends, as the board's stream does if the board is gone, when the board sends nothing more.
    """
    rest = b""
    try:
        async for chunk in answer.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    line = b"data: " + _named(device, line.removeprefix(b"data: "))
                yield line + b"\n"
            if len(rest) > MAX_REPLY:
                return
    except UNREACHABLE:
        return
    finally:
        answer.close()


async def pass_live(
    client: WebSocket, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]
) -> str:
    """Pass a live session through to a device until either side ends it.

    Returns why the device did not take it, and then the client was not accepted yet; or nothing.
    """
    offered = client.scope.get("subprotocols", [])
    try:
        device = await session.ws_connect(
            URL(url, encoded=True),
            headers=dict(headers),
            protocols=[name for name in offered if name.startswith(KEY_PROTOCOL)],
            max_msg_size=MAX_MESSAGE,
            heartbeat=HEARTBEAT_SECONDS,
            timeout=aiohttp.ClientWSTimeout(ws_close=CONNECT_SECONDS),
        )
    except aiohttp.WSServerHandshakeError as error:
        return f"refused the session ({error.status})"
    except UNREACHABLE as error:
        return f"does not answer ({type(error).__name__})"
    async with device:
        await client.accept(device.protocol)
        ways = [asyncio.ensure_future(way(client, device)) for way in (_upwards, _downwards)]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ways:
                task.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        broken = any(isinstance(task.exception(), (*UNREACHABLE, RuntimeError)) for task in done)
        if broken or device.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
            await refuse_live(client, Refusal(503, "the device is gone; connect again", 5))
        elif device.close_code is not None:
            with contextlib.suppress(RuntimeError, ConnectionError):
                await client.close(device.close_code)
    return ""


async def _upwards(client: WebSocket, device: Any) -> None:
    """The client's images, to the device."""
    while True:
        message = await client.receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("bytes") is not None:
            await device.send_bytes(message["bytes"])
        else:
            await device.send_str(message.get("text") or "")


async def _downwards(client: WebSocket, device: Any) -> None:
    """The device's answers, to the client."""
    async for message in device:
        if message.type == aiohttp.WSMsgType.TEXT:
            await client.send_text(message.data)

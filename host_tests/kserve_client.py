"""KServe's client asks a service: `kserve_client.py URL GRPC_ADDRESS FRAMES.npy`.

In a process of its own, because its protobuf messages have the names of those of Triton's client.
It prints the logits of four answers as JSON.
"""

import asyncio
import json
import sys

import kserve
import numpy as np
import pytest
from kserve.inference_client import RESTConfig


def request(frames, binary):
    given = kserve.InferInput("frames", list(frames.shape), "UINT8")
    given.set_data_from_numpy(frames, binary_data=binary)
    return kserve.InferRequest("tiny", [given], request_id="7")


async def over_http(url, frames):
    async with kserve.InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "tiny")
        assert not await client.is_model_ready(url, "none")
        with pytest.raises(Exception, match="no program 'none'"):
            await client.infer(url, request(frames, True), "none")
        return [await client.infer(url, request(frames, b), "tiny") for b in (True, False)]


async def over_grpc(address, frames):
    async with kserve.InferenceGRPCClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("tiny")
        return [await client.infer(request(frames, binary)) for binary in (True, False)]


def main(url, address, file):
    frames = np.load(file)
    answers = [*asyncio.run(over_http(url, frames)), *asyncio.run(over_grpc(address, frames))]
    rows = []
    for answer in answers:
        assert (answer.id, answer.model_name) == ("7", "tiny")
        (logits,) = [each for each in answer.outputs if each.name == "logits"]
        rows.append(logits.as_numpy().tolist())
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])

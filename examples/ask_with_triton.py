"""Asks a running cluster with the client of NVIDIA's Triton, to which a cluster looks like any server.

    pip install 'tritonclient[http]'
    snn-run --local net.shards --http 8000
    python examples/ask_with_triton.py localhost:8000 localhost:8001

Any node may be asked. Sends the same noise to each node given, as JSON and as binary tensors, and
compares the answers.
"""

import sys

import numpy as np
import tritonclient.http as triton


def ask(address, pixels_of, binary):
    client = triton.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready()
    model = client.get_model_metadata("model")
    (described,) = model["inputs"]
    tensor = triton.InferInput(described["name"], described["shape"], described["datatype"])
    tensor.set_data_from_numpy(pixels_of(described["shape"]), binary_data=binary)
    (output,) = model["outputs"]
    wanted = triton.InferRequestedOutput(output["name"], binary_data=binary)
    answer = client.infer("model", [tensor], outputs=[wanted], request_id="1")
    assert answer.get_response()["id"] == "1"
    return answer.as_numpy(output["name"])


def main(addresses):
    noise = lambda shape: np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    answers = {(a, b): ask(a, noise, b) for a in addresses for b in (False, True)}
    first = next(iter(answers.values()))
    for (address, binary), answer in answers.items():
        difference = np.abs(answer - first).max()
        how = "binary" if binary else "JSON"
        print(f"{address} {how}: class {answer.argmax()}, largest difference {difference:.1e}")
        assert difference <= 1e-4


if __name__ == "__main__":
    main(sys.argv[1:] or ["localhost:8000"])

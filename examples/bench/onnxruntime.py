"""Prints the least time in ms of a model in ONNX Runtime on one thread, and its version."""
import sys, time
import numpy as np, onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
port = session.get_inputs()[0]
image = np.random.default_rng(0).uniform(-1, 1, port.shape).astype(np.float32)
times = []
for _ in range(10 + int(sys.argv[2])):
    start = time.perf_counter()
    session.run(None, {port.name: image})
    times.append(1e3 * (time.perf_counter() - start))
print(min(times), ort.__version__)

"""Writes the pickles of this folder: two images in the layout of CIFAR-10's Python batches.

Run once by the Python 2.7 and numpy 1.16 that CIFAR was distributed for, and once by a Python 3:

    python2.7 pickles.py && python3 pickles.py
"""

import os
import pickle
import sys

import numpy

folder = os.path.dirname(os.path.abspath(__file__))
pixels = (numpy.arange(2 * 3072) * 7 % 256).astype(numpy.uint8).reshape(2, 3072)
batch = {
    "batch_label": "training batch 1 of 5",
    "labels": [6, 9],
    "data": pixels,
    "filenames": ["frog_1.png", "truck_2.png"],
    # Not part of CIFAR: what would be read in the wrong order must not be read.
    "columns": numpy.asfortranarray(pixels[:, :2]),
}
for protocol in [2] if sys.version_info[0] == 2 else [2, 3, 4, 5]:
    name = "python%d_protocol%d.pkl" % (sys.version_info[0], protocol)
    with open(os.path.join(folder, name), "wb") as file:
        pickle.dump(batch, file, protocol)

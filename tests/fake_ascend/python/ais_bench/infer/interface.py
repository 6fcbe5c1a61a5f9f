"""Stand in for ais_bench's InferSession: run an `.om` of tests/fake_ascend/bin/atc in the thread that loaded it."""

import json
import os
import threading
from pathlib import Path
from typing import List

import numpy as np


class InferSession:
    """A model of one batch size on a device; prints on stdout, as its C++ part does too."""

    def __init__(self, device_id: int, model_path: str) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        about = json.loads(Path(model_path).read_text())
        self.thread = threading.get_ident()
        self.shape = about["batch"], *about["frame_shape"]
        self.session = onnxruntime.InferenceSession(about["onnx"], providers=["CPUExecutionProvider"])
        print(f"[INFO] load model {model_path} success")
        os.write(1, f"[INFO] device {device_id}\n".encode())

    def infer(self, feeds: List[np.ndarray]) -> List[np.ndarray]:
        if threading.get_ident() != self.thread:
            raise RuntimeError("[107002] the context is of another thread")
        size = int(np.prod(self.shape)) * 4
        if feeds[0].nbytes != size:
            raise RuntimeError(f"Check i:0 name:image in size:{feeds[0].nbytes} needsize:{size} not match")
        return self.session.run(None, {"image": feeds[0]})

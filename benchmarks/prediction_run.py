"""One contender on one image, in a process of its own: what ``benchmarks/prediction.py`` starts for every run.

    python benchmarks/prediction_run.py JOB.json

The job names contender, network, image and settings; the result (a JSON file that the job names) has seconds, peak memory,
the plan of execution, and how the logits compare with those of the reference.
"""

import ctypes
import gc
import itertools
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prediction_contenders import Contender, make_contender
from torch import Tensor

from nnunet_norm.metrics import TileMismatch


class Sampler(threading.Thread):
    """The peak of this process's anonymous memory while the block runs, and of the scratch in a folder."""

    EVERY = 0.005
    """Seconds between samples of the memory; scratch is looked at in every 20th."""

    def __init__(self, folder: str | None) -> None:
        super().__init__(daemon=True)
        self.folder, self.stopped = folder, threading.Event()
        try:
            self.status: int | None = os.open("/proc/self/status", os.O_RDONLY)
            self.how = f"RssAnon of /proc/self/status, every {self.EVERY * 1000:.0f} ms"
            self.now()
        except (OSError, IndexError):
            self.status, self.how = None, "ru_maxrss: peak of all resident memory since the process began"

    def now(self) -> int:
        """Bytes."""
        if self.status is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return int(os.pread(self.status, 8192, 0).split(b"RssAnon:")[1].split()[0]) * 1024

    def mapped(self) -> int:
        """Bytes of the folder's files that are mapped into memory, those without a name any more too."""
        if not self.folder or self.status is None:
            return 0
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [words[0].split("-") for words in lines if len(words) == 6 and words[5].startswith(self.folder)]
        return sum(int(stop, 16) - int(start, 16) for start, stop in spans)

    def run(self) -> None:
        """Look, until the block ends."""
        for count in itertools.count():
            self.peak = max(self.peak, self.now())
            if count % 20 == 0:
                self.on_disk = max(self.on_disk, self.mapped())
            if self.stopped.wait(self.EVERY):
                break

    def __enter__(self) -> "Sampler":
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what is taken from it
        self.start_bytes = self.peak = self.now()
        self.on_disk = self.mapped()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self.now())
        self.stopped.set()
        self.join()

    @property
    def above(self) -> int:
        """Bytes that the block took at most, above what there was before it."""
        return self.peak - self.start_bytes


def timed(predict: Callable[[Tensor], Tensor], image: Tensor, job: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The logits, and seconds and memory."""
    on_cuda = torch.device(job["device"]).type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Sampler(job["scratch"]) as sampler:
        start = time.perf_counter()
        logits = predict(image)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "anonymous_before": sampler.start_bytes,
        "anonymous_above": sampler.above,
        "on_disk": sampler.on_disk if job["scratch"] and sampler.status is not None else None,
        "measured_as": sampler.how,
    }
    if on_cuda:
        found |= {"device_before": before, "device_above": torch.cuda.max_memory_allocated() - before}
    return logits, found


def does_not_fit(made: Contender, image: Tensor, job: dict[str, Any]) -> dict[str, Any] | None:
    """Whether the whole pass would take more memory than there is, from what it takes for one patch."""
    small = crop(image, job)
    on_cuda = torch.device(job["device"]).type == "cuda"
    needs = timed(made.predict, small, job)[1]["device_above" if on_cuda else "anonymous_above"]
    needs = round(needs * image[0].numel() / small[0].numel() * 1.05)
    available = torch.cuda.mem_get_info()[0] if on_cuda else available_memory()
    too_much = available is not None and needs > 0.95 * available
    return {"status": "does not fit", "needs": needs, "available": available} if too_much else None


def available_memory() -> int | None:
    """Bytes that can be had without swapping, where the system tells."""
    with suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return None


def crop(image: Tensor, job: dict[str, Any]) -> Tensor:
    """One patch, for warming up."""
    return image[(..., *(slice(0, n) for n in job["patch"]))].contiguous()


def compare(logits: Tensor, reference: np.ndarray) -> dict[str, Any]:
    """Share of labels that differ, and the largest difference in float32, slab by slab."""
    axis = int(np.argmax(logits.shape[1:])) + 1
    differ, distance, largest, labels = 0, 0.0, 0.0, np.zeros(len(logits), dtype=np.int64)
    for start in range(0, logits.shape[axis], 16):
        part = (slice(None),) * axis + (slice(start, start + 16),)
        ours, theirs = logits[part].float(), torch.from_numpy(np.array(reference[part]))
        differ += int((ours.argmax(0) != theirs.argmax(0)).sum())
        distance = max(distance, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
        labels += np.bincount(theirs.argmax(0).flatten().numpy(), minlength=len(logits))
    mismatch = TileMismatch((), distance, largest, 1, "float32")
    return {
        "labels_differ": differ / logits[0].numel(),
        "max_difference": distance,
        "max_logit": largest,
        "is_rounding": distance == 0 or mismatch.is_rounding,
        "label_shares": [round(n / labels.sum(), 4) for n in labels.tolist()],
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, predict, compare."""
    net = torch.load(job["network"], weights_only=False).to(job["device"]).eval()
    image = torch.from_numpy(np.load(job["image"]))
    made = make_contender(net, job)
    on_cuda = torch.device(job["device"]).type == "cuda"
    torch.backends.cudnn.benchmark = on_cuda  # nnU-Net's predictor sets it for itself
    made.predict(crop(image, job))
    if job["contender"].startswith("whole"):
        refusal = does_not_fit(made, image, job)
        if refusal:
            return refusal
    if on_cuda:  # the first pass of a shape chooses algorithms
        made.predict(image)
    logits, found = timed(made.predict, image, job)
    found |= {"status": "done", "plan": made.plan(), "load": os.getloadavg()[0], "dtype": str(logits.dtype)[6:]}
    reference = Path(job["reference"])
    if job["is_reference"]:
        np.save(reference, logits.float().numpy())
    if job["compare"] and reference.exists():
        found |= compare(logits, np.load(reference, mmap_mode="r"))
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(job["threads"])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process goes, and no other
    try:
        found = measure(job)
    except Exception as error:  # a contender that fails is a result, and the others go on
        logging.exception("the run failed")
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        found = {"status": "out of memory" if is_memory else "failed", "why": why}
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

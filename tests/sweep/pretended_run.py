"""One run of a sweep whose training is pretended: it counts, goes on where it was, and leaves what nnU-Net would."""

import os
import sys
import time
import zipfile
from pathlib import Path


def train(results):
    count = results / "count"
    reached = int(count.read_text()) if count.exists() else 0
    print("begins at", reached, flush=True)  # noqa: T201
    if (results / "fails").exists():
        print("all is lost")  # noqa: T201
        sys.exit(3)
    (results / "training").write_text(str(os.getpid()))
    while reached < 20 or (results / "waits").exists():
        time.sleep(0.02)
        reached += 1
        (results / "count.new").write_text(str(reached))
        (results / "count.new").replace(count)
    if (results / "leaves nothing").exists():
        return
    with zipfile.ZipFile(results / "checkpoint_final.pth", "w") as checkpoint:
        checkpoint.writestr("nothing", "")
    (results / "validation").mkdir(exist_ok=True)
    text = '{"metric_per_case": [], "foreground_mean": {"Dice": 0.5}}'
    (results / "validation" / "summary.json").write_text(text)


if __name__ == "__main__" and sys.argv[1] == "train":
    train(Path(sys.argv[2]))
elif __name__ == "__main__":
    from nnunet_norm.sweep import locking, training

    locking.MOMENT = 1.0
    training._command = lambda task: [sys.executable, __file__, "train", str(task.results)]
    sys.exit(training.main(sys.argv[1:]))

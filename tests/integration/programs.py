"""Real programs that start faster: processes forked from one that has imported what all of them import.

Importing torch and nnU-Net takes most of the time of a short program. This file, started as a program, imports them once and
then forks a process for every command that it is sent, in which the program's entry point runs as its script would run it:
with its own arguments, output, folder, random numbers, and exit code.
"""

import gc
import json
import os
import random
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path


class Programs:
    """Runs console scripts in processes that are forked from one.

    Args:
        env: of all of them, from the beginning: nnU-Net reads its variables when it is imported.
        folder: in which they work.
    """

    def __init__(self, env, folder):
        self.env, self.folder = dict(env), Path(folder)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=self.env,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command, variables):
        """Run a command to its end, as ``subprocess.run`` with captured output; ``variables`` are its own."""
        paths = {stream: self.folder / f".{stream}_{os.getpid()}" for stream in ("stdout", "stderr")}
        request = {"command": command, "variables": variables} | {name: str(path) for name, path in paths.items()}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        assert code, "the process from which programs are forked has ended"
        said = [path.read_text(errors="replace") for path in paths.values()]
        for path in paths.values():
            path.unlink()
        return subprocess.CompletedProcess(command, int(code), *said)

    def end(self):
        """End the process from which others are forked."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def is_program(name):
    """Whether a command is a console script of this package or of nnU-Net."""
    return name.startswith(("nnUNetv2_", "nnunet-norm")) and bool(entry_points(group="console_scripts", name=name))


def import_what_programs_import():
    """All that takes long, in the order of a training; with nnU-Net's trainers, which every search for one imports."""
    import nnunetv2
    import nnunetv2.inference.predict_from_raw_data
    import nnunetv2.run.run_training
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    import nnunet_norm.evaluation
    import nnunet_norm.prediction
    import nnunet_norm.training  # noqa: F401

    (folder,) = nnunetv2.__path__
    place = "nnunetv2.training.nnUNetTrainer"
    recursive_find_python_class(str(Path(folder, "training", "nnUNetTrainer")), "none of them", place)


def serve():
    """Fork a process for every line of the standard input, and write its exit code. In those it returns: the request."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    import_what_programs_import()
    gc.collect()
    gc.freeze()  # or a forked process would copy all pages to count references
    for line in iter(requests.readline, ""):
        child = os.fork()
        if not child:
            requests.close()
            answers.close()
            return json.loads(line)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)
    os._exit(0)


def begin(request):
    """Become the program; its exit code."""
    import numpy as np

    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= request["variables"]
    random.seed()
    np.random.seed()  # noqa: NPY002 - the generator that nnU-Net uses; what is imported once must not be drawn twice
    sys.argv = request["command"]
    (script,) = entry_points(group="console_scripts", name=sys.argv[0])
    return script.load()()


if __name__ == "__main__":
    sys.exit(begin(serve()))

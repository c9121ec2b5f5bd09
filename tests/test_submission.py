"""Command lines as jobs: what reaches sbatch, what a job does with its command, and what is refused. SLURM is pretended."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_norm.errors import SetupError, SubmissionError
from nnunet_norm.submission import (
    Command,
    Resources,
    Submitted,
    check_executor,
    last_lines,
    submit_commands,
    wait_for,
)
from nnunet_norm.submission import command as command_module


def python(code):
    return [sys.executable, "-c", code]


def options(script):
    lines = script.read_text().splitlines()
    return dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if "#SBATCH" in line and "=" in line)


def test_an_array_and_what_comes_after_it(cluster, tmp_path):
    """Every resource is asked for in SLURM's words, of both; the last job has neither GPU nor more than one core."""
    resources = Resources("gpu", gpus=2, cpus=6, memory=3 * 2**29, minutes=90, array_limit=2, setup=["module load x"])
    made = submit_commands(
        [python("0"), python("1"), python("2")],
        name="it",
        folder=tmp_path / "logs",
        resources=resources,
        then=python("3"),
    )
    assert (made.ids, made.last.job_id, made.refusal) == (["41_0", "41_1", "41_2"], "42", None)
    asked = options(cluster / "script_41")
    assert {name: asked[name] for name in ("array", "partition", "gpus-per-node", "cpus-per-task", "mem", "time")} == {
        "array": "0-2%2",
        "partition": "gpu",
        "gpus-per-node": "2",
        "cpus-per-task": "6",
        "mem": "1536MB",
        "time": "90",
    }
    assert (asked["job-name"], asked["signal"]) == ("it", "USR2@90")
    script = (cluster / "script_41").read_text()
    assert "#SBATCH --requeue\n" in script
    assert "\nmodule load x\n" in script
    assert "--cpus-per-task=6 " in next(line for line in script.splitlines() if line.startswith("srun "))
    after = options(cluster / "script_42")
    assert (after["dependency"], after["cpus-per-task"], after["partition"]) == ("afterany:41", "1", "gpu")
    assert "gpus-per-node" not in after
    assert [job.submission().function.command for job in made.jobs] == [python("0"), python("1"), python("2")]
    assert made.log_of(made.jobs[1]) == tmp_path / "logs" / "41_1_0_log.out"


def test_one_command_is_no_array(cluster, tmp_path):
    """And what is not asked for is left to the cluster; a short job is warned when a quarter of its time is left."""
    made = submit_commands([python("0")], name="it", folder=tmp_path, resources=Resources(minutes=4))
    assert made.ids == ["41"]
    assert made.last is None
    asked = options(cluster / "script_41")
    assert not asked.keys() & {"array", "partition", "mem", "gpus-per-node", "dependency"}
    assert asked["signal"] == "USR2@60"


def test_a_job_inside_a_job_inherits_nothing_of_it(cluster, tmp_path, monkeypatch):
    """Variables of SLURM are hidden from sbatch, but where its configuration is; afterwards they are there again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/of/mine")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    submit_commands([python("0")], name="it", folder=tmp_path, resources=Resources())
    seen = (cluster / "env_41").read_text()
    assert "SLURM_MEM_PER_NODE" not in seen
    assert "SLURM_CONF=/etc/of/mine" in seen
    assert "SBATCH_ACCOUNT=mine" in seen
    assert os.environ["SLURM_MEM_PER_NODE"] == "1"


def test_a_refusal_of_the_cluster_is_one_line(cluster, tmp_path, capfd):
    """In its own words, and nothing else on the screen."""
    with pytest.raises(
        SubmissionError, match=r"^the jobs were refused: sbatch: error: invalid partition specified: none$"
    ):
        submit_commands([python("0")], name="it", folder=tmp_path, resources=Resources("none"))
    assert capfd.readouterr().err == ""


def test_a_refused_last_job_leaves_the_others(cluster, tmp_path, monkeypatch):
    """They were submitted; that the last one was not is told, with the cluster's reason."""
    monkeypatch.setenv("REFUSE_DEPENDENT", "1")
    made = submit_commands([python("0")], name="it", folder=tmp_path, resources=Resources(), then=python("1"))
    assert (made.ids, made.last) == (["41"], None)
    assert made.refusal.endswith("no such QOS")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("gpus", -1, 0), ("cpus", 0, 1), ("minutes", 0, 1), ("array_limit", 0, 1), ("memory", 5, 2**20)],
)
def test_resources_that_no_job_can_have(name, value, least):
    """Named, with the least that there is."""
    with pytest.raises(SubmissionError, match=f"{name} {value} of a job must be {least} or more"):
        Resources(**{name: value})


def test_without_slurm_or_submitit(tmp_path, monkeypatch):
    """What is missing, and what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="sbatch is not on this machine: submit where SLURM's programs are"):
        check_executor()
    check_executor("local")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SetupError, match=r"needs the package submitit .*: pip install 'nnunet_norm\[slurm\]'"):
        check_executor("local")


def test_a_failed_command_tells_its_last_lines(capfd):
    """All of its output is in the log, standard error among it."""
    code = "import sys; [print(i, flush=True) for i in range(30)]; print('that is why', file=sys.stderr); sys.exit(2)"
    with pytest.raises(SubmissionError) as told:
        Command(python(code))()
    lines = str(told.value).splitlines()
    assert lines[0].endswith("ended with 2; its last lines:")
    assert lines[-1] == "that is why"
    assert len(lines) == 1 + command_module.LAST_LINES
    assert [str(i) for i in range(30)] == capfd.readouterr().out.splitlines()[1:31]


def test_a_killed_command_whose_children_live_on_does_not_hang():
    """They hold its output open; the job tells of the failure all the same."""
    code = "import os, signal, subprocess; subprocess.Popen(['sleep', '4']); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(SubmissionError, match="was killed by SIGKILL"):
        Command(python(code))()


def test_the_warning_of_slurm_does_not_reach_the_command():
    """It goes to every process of a job, and would end those that do not handle it."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGUSR1)"
    Command(python(code))()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.parametrize(("state", "code"), [("RUNNING", None), ("COMPLETING", 143), (None, 143)])
def test_a_command_that_was_terminated(cluster, monkeypatch, state, code):
    """While SLURM lets the job run on, it is requeued as after a warning; else it ends without the result of a failure."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    if state is not None:
        (cluster / "queue").write_text(f"41_1 RUNNING None\n41_3 {state} None\n")

    def warned(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGUSR2, warned)
    try:
        with pytest.raises(InterruptedError if code is None else SystemExit) as ended:
            Command(python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)"))()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert getattr(ended.value, "code", None) == code


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_checkpoint_ends_the_command_and_keeps_it(monkeypatch, stubborn):
    """By Ctrl-C's signal, and if that is ignored by one that cannot be; what is submitted again is the same command."""
    monkeypatch.setattr(command_module, "INTERRUPTION_SECONDS", 1)
    # Said either way: a process that was started in the background of a shell would ignore it, too.
    answer = "SIG_IGN" if stubborn else "SIG_DFL"
    made = Command(
        python(
            f"import signal, time; signal.signal(signal.SIGINT, signal.{answer}); print('up', flush=True); time.sleep(60)"
        )
    )
    process = subprocess.Popen(made.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"up\n"
    made._process = process
    again = made.checkpoint()
    assert process.wait(1) == -(signal.SIGKILL if stubborn else signal.SIGINT)
    process.stdout.close()
    assert again.function.command == made.command
    assert again.function is not made


def test_a_job_of_submitit_is_requeued_and_goes_on(tmp_path):
    """With its own machinery, on this machine: the signal of a preemption, and the command begins again where it was."""
    file = tmp_path / "reached"
    code = f"""if True:
        import sys, time
        from pathlib import Path
        file = Path({str(file)!r})
        if file.exists():
            print("went on", flush=True)
            sys.exit()
        file.touch()
        time.sleep(60)
    """
    made = submit_commands([python(code)], name="it", folder=tmp_path / "logs", resources=Resources(), executor="local")
    (job,) = made.jobs
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    next_of(job).send_signal(signal.SIGUSR2)
    assert job.result() is None
    assert "went on" in made.log_of(job).read_text()


def next_of(job):
    """The process of a local job, below its controller; signals go to it as SLURM sends them."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    return SimpleNamespace(send_signal=lambda number: [os.kill(int(child), number) for child in children])


class PretendedJob:
    """A job that SLURM knows by its id, and whose result is a file."""

    def __init__(self, folder, job_id, error=None):
        self.job_id, self.error = job_id, error
        self.paths = SimpleNamespace(result_pickle=folder / job_id, stdout=folder / f"{job_id}.out")

    def exception(self):
        return self.error


def test_waiting_without_accounting(cluster, tmp_path):
    """A job is over with its result, or once the queue lacks it twice; while SLURM does not answer, nothing is over."""
    done, failed, killed = (PretendedJob(tmp_path, f"41_{i}", ValueError("x") if i == 1 else None) for i in range(3))
    last = PretendedJob(tmp_path, "42")
    looks = deque(
        [
            lambda: (cluster / "queue").write_text("41_0 RUNNING None\n41_1 RUNNING None\n42 PENDING Dependency\n"),
            lambda: [(cluster / "queue").unlink(), (cluster / "why").write_text("Unable to contact slurm controller")],
            lambda: [job.paths.result_pickle.touch() for job in (done, failed)],
            lambda: (cluster / "why").write_text("Invalid job id specified"),
            lambda: last.paths.result_pickle.touch(),
        ]
    )
    told = []

    def tell(ended, states):
        told.append((ended, states))
        if looks:
            looks.popleft()()

    (cluster / "queue").write_text("41_0 PENDING Resources\n41_1 RUNNING None\n41_2 RUNNING None\n")
    submitted = Submitted([done, failed, killed], last, None, tmp_path)
    assert wait_for(submitted, tell, 0) == [1, 2]
    assert told[0] == (0, {"41_0": "PENDING Resources", "41_1": "RUNNING", "41_2": "RUNNING", "42": ""})
    assert told[2] == (0, dict.fromkeys(("41_0", "41_1", "41_2", "42"), "UNKNOWN"))
    assert told[3][0] == 2
    assert told[-1] == (4, {})


def test_last_lines_are_those_of_the_command(tmp_path):
    """Neither of submitit nor of srun; of a job that SLURM killed, what SLURM wrote."""
    log = tmp_path / "log"
    log.write_text(
        "submitit INFO a\n1\n2\nsubmitit ERROR b\nTraceback\nx.SubmissionError: p ended with 2:\n1\n2\n\nsrun: error: c\n"
    )
    assert last_lines(log) == ["1", "2"]
    log.write_text("1\n2\nslurmstepd: error: oom\nsrun: error: c\n")
    assert last_lines(log, 2) == ["2", "slurmstepd: error: oom"]
    assert last_lines(tmp_path / "missing") == []


def test_submitit_is_not_imported_before_it_is_needed():
    """The package is optional."""
    code = "import sys, nnunet_norm.submission; sys.exit('submitit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.import_module("nnunet_norm.submission").__all__

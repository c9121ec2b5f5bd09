"""What every test starts from: none of the user's nnU-Net settings, no window for a figure, one thread; a pretended SLURM."""

import os
import signal
import stat

import hypothesis
import pytest

# No test asserts a time, and a busy machine takes its own.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# At import, because nnU-Net reads its variables once, when it is first imported.
for _variable in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[_variable]
os.environ["MPLBACKEND"] = "Agg"
# Where it is set, every program that a test starts compiles the whole package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Threads that spin while they wait make two busy processes on two cores more than ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ignored where a shell has begun the tests in the background; what they start would not hear it either.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signal in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_signal, signal.SIG_DFL)

SBATCH = """#!/bin/sh
# Numbers the jobs, and keeps their scripts and what the environment says of the job that submits.
n=$(( $(cat {folder}/count 2>/dev/null || echo 40) + 1 ))
echo $n > {folder}/count
cp "$1" {folder}/script_$n
env > {folder}/env_$n
if grep -q "partition=none" "$1"; then echo "sbatch: error: invalid partition specified: none" >&2; exit 1; fi
if [ -n "$REFUSE_DEPENDENT" ] && grep -q dependency "$1"; then echo "sbatch: error: no such QOS" >&2; exit 1; fi
echo "Submitted batch job $n"
"""

SQUEUE = """#!/bin/sh
cat {folder}/queue 2>/dev/null && exit 0
echo "slurm_load_jobs error: $(cat {folder}/why)" >&2
exit 1
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays in tests are too small to be worth sharing out."""
    import torch  # after the variables above, which OpenMP reads when it is loaded

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Programs of a pretended SLURM that come first on the PATH; the folder of what they keep."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "why").write_text("Invalid job id specified")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder

"""What every test starts from: none of the user's nnU-Net settings, and no window for a figure."""

import os

# At import, because nnU-Net reads its variables once, when it is first imported.
for _variable in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[_variable]
os.environ["MPLBACKEND"] = "Agg"
# Threads that spin while they wait make two busy processes on two cores more than ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

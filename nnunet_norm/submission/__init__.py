"""Command lines as jobs of a cluster: an array, and a job that comes after it. SLURM through submitit, which is optional.

Every command runs as a fresh process, not in that of submitit, whose signal handlers would be inherited by forked children.
A command must be such that, begun again, it goes on where it was; then a job may be preempted, run out of its time or be
requeued at any moment.
"""

from nnunet_norm.submission.array import Resources, check_executor, submit_commands
from nnunet_norm.submission.command import Command
from nnunet_norm.submission.queue import Submitted, last_lines, states, wait_for

__all__ = ["Command", "Resources", "Submitted", "check_executor", "last_lines", "states", "submit_commands", "wait_for"]

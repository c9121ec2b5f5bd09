"""What a caller can mend, in one tree.

Every message is one line that names the parameter, its value, and the choice or remedy. Internal invariants are
``assert`` statements and do not appear here.
"""


class NnunetNormError(ValueError):
    """Base of every error that the caller can mend."""


class TrainerNameError(NnunetNormError):
    """A trainer name that begins like one of ours and does not follow the naming scheme."""


class PlansError(NnunetNormError):
    """Plans that are missing, invalid, or contradict the trainer's name."""


class LayerError(NnunetNormError):
    """A normalization layer that cannot be built or applied as asked."""


class ArchitectureError(NnunetNormError):
    """A network that cannot be analysed or run as asked."""


class StatisticsError(NnunetNormError):
    """Population statistics that cannot be estimated: no norms that have any, an empty population, values not finite."""


class TilingError(NnunetNormError):
    """Tile shape, halo and image that do not go together."""


class ModelFolderError(NnunetNormError):
    """A trained model that is missing, incomplete, or does not fit its plans."""


class InputImageError(NnunetNormError):
    """An image that cannot be predicted: channels missing, values not finite, unreadable."""


class OutputError(NnunetNormError):
    """An output that cannot be written: read-only folder, full disk, a file that is already there."""


class SetupError(NnunetNormError):
    """An environment variable or an optional package that is missing."""


class SubmissionError(NnunetNormError):
    """Jobs that a cluster refuses, or one that failed."""


class ExperimentalBatchesError(NnunetNormError):
    """A file of experimental batches that is missing, malformed, or does not fit the dataset or the plans."""


class LaunchError(NnunetNormError):
    """A training whose processes cannot be started, find each other, or agree on what to train."""


class EvaluationError(NnunetNormError):
    """Predictions that cannot be compared with their references."""


class EnsembleError(NnunetNormError):
    """Models or probabilities that cannot be averaged."""


class GridError(NnunetNormError):
    """The description of a sweep that is malformed, empty, or does not fit the dataset."""


class SweepError(NnunetNormError):
    """A sweep that cannot be run: somebody else trains the same models, or trainings that failed."""

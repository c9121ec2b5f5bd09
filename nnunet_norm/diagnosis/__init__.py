"""What normalization does to a trained model: measured on real images, told in one sentence, shown in one report."""

from nnunet_norm.diagnosis.cases import cases_of_dataset, cases_of_folder
from nnunet_norm.diagnosis.fields import Fields, describe_fields, receptive_fields
from nnunet_norm.diagnosis.findings import Findings, Verdict, verdict_of
from nnunet_norm.diagnosis.gradient_figure import draw_gradient_map
from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.diagnosis.run import Diagnosis, Finished

__all__ = [
    "DiagnosedModel",
    "Diagnosis",
    "Fields",
    "Findings",
    "Finished",
    "Verdict",
    "cases_of_dataset",
    "cases_of_folder",
    "describe_fields",
    "draw_gradient_map",
    "receptive_fields",
    "verdict_of",
]

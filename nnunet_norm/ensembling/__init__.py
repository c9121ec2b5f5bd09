"""Averaging models, and finding which of them to average."""

from nnunet_norm.ensembling.instructions import instructions_of, table_of, write_findings
from nnunet_norm.ensembling.members import Member, member_of_folder
from nnunet_norm.ensembling.merging import Merging, merge_folders
from nnunet_norm.ensembling.models import Model
from nnunet_norm.ensembling.postprocessing import Postprocessing, load_postprocessing
from nnunet_norm.ensembling.predicting import Prediction, predict_ensemble
from nnunet_norm.ensembling.search import Candidate, Found, Search

__all__ = [
    "Candidate",
    "Found",
    "Member",
    "Merging",
    "Model",
    "Postprocessing",
    "Prediction",
    "Search",
    "instructions_of",
    "load_postprocessing",
    "member_of_folder",
    "merge_folders",
    "predict_ensemble",
    "table_of",
    "write_findings",
]

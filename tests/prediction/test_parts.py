"""Parts of a folder of cases: those that ``predict_from_files`` makes of them, and what is missing of each."""

import pytest
import torch
from tiny_models import write_image, write_model

from nnunet_norm.errors import InputImageError, OutputError
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.parts import CaseParts


@pytest.fixture
def predictor(tmp_path):
    for number in range(5):
        write_image(tmp_path / "images", f"c{number}_0000", seed=number, shape=(16, 16, 16))
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False)
    made.initialize_from_trained_model_folder(str(write_model(tmp_path / "model")), (0,))
    return made


def test_a_part_is_missing_until_it_was_predicted(tmp_path, predictor):
    """Part by part with nnU-Net's own division, of five cases into two; probabilities are a matter of their own."""
    source, output = str(tmp_path / "images"), str(tmp_path / "out")
    cases = CaseParts(predictor, source)
    assert cases.missing_parts(2, output, probabilities=False) == [0, 1]
    predictor.predict_from_files(source, output, False, True, 0, 0, None, 2, 1)
    assert cases.missing_parts(2, output, probabilities=False) == [0]
    assert cases.missing(output, probabilities=False) == [0, 2, 4]
    with pytest.raises(OutputError, match=r"lacks 3 of 5 cases \(c0, c2, c4\): predict part 0 of 2 again"):
        cases.verify(2, output, probabilities=False)
    predictor.predict_from_files(source, output, True, True, 0, 0, None, 2, 0)
    cases.verify(2, output, probabilities=False)
    assert cases.missing_parts(2, output, probabilities=True) == [1]


def test_what_cannot_be_predicted_is_refused(tmp_path, predictor):
    """As the prediction would, before anything is submitted."""
    with pytest.raises(InputImageError, match="is of no use: this configuration is not the second stage"):
        CaseParts(predictor, str(tmp_path / "images"), str(tmp_path))

"""Models by name: what a library says of one that cannot be loaded is passed on, also when it says nothing."""

import pytest
import torch

from posterity.claims.coding.idempotent_codec import _prior
from posterity.lab.pretrained import load


class Nothing:
    @staticmethod
    def from_pretrained(model):
        raise OSError(model)


@pytest.mark.parametrize(("said", "why"), [("", "OSError"), ("\n", "OSError"), ("gone\nfor good", "gone")])
def test_a_model_that_cannot_be_loaded_is_refused_by_its_argument(said, why):
    with pytest.raises(ValueError, match=f"^model must be a folder, got 'here': {why}$"):
        load(Nothing, said, "model must be a folder", "here")


def test_a_prior_that_is_nowhere_is_refused_by_name(tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="prior must be a folder or name of a UNet2DModel"):
        _prior(str(tmp_path), torch.zeros(1), 1, 0)

"""Starting from another run's bundle: whole parts may be new, anything else must be there."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.made import save_random_bundle
from udiff.fit import initialize
from udiff.recipe import load_recipe
from udiff.weights import WeightsError


@pytest.fixture
def bundle(tmp_path):
    save_random_bundle(tmp_path / "bundle", load_recipe("kl_autoencoder/debug"), seed=1)
    return tmp_path / "bundle"


def _system(*overrides):
    return load_recipe("kl_autoencoder/debug", overrides).build()


def _keep(bundle, wanted):
    weights = load_file(bundle / "weights.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if wanted(key)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, bundle / "weights.safetensors")
    return kept


def test_a_part_that_the_bundle_knows_nothing_of_stays_as_it_is(bundle):
    kept = _keep(bundle, lambda key: ".decoder.mid_block." not in key)
    system = _system()
    own = {
        key: tensor.clone()
        for key, tensor in torch.nn.ModuleDict(system.modules).state_dict().items()
    }
    initialize(system, str(bundle))
    for key, tensor in torch.nn.ModuleDict(system.modules).state_dict().items():
        assert torch.equal(tensor, kept.get(key, own[key]))


def test_a_part_that_lacks_one_parameter_is_refused(bundle):
    [module] = _system().modules
    missing = f"{module}.model.decoder.mid_block.resnets.0.conv1.weight"
    _keep(bundle, lambda key: key != missing)
    with pytest.raises(
        WeightsError, match=r"missing keys \['model.decoder.mid_block.resnets.0.conv1.we"
    ):
        initialize(_system(), str(bundle))


def test_a_list_that_is_longer_than_the_bundles_is_refused(bundle):
    with pytest.raises(WeightsError, match="missing keys"):
        initialize(_system("network.layers_per_block=2"), str(bundle))

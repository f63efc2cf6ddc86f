"""What cases are made of: the transformer, T5 and autoencoder of a case's file."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from tests.golden.case import Case, _tensors
from udiff.autoencoders.kl import KLAutoencoder
from udiff.encoders.frozen import Frozen
from udiff.encoders.t5 import T5
from udiff.models.dual_diffusion.checkpoint import network_from_official
from udiff.models.dual_diffusion.network import DualDiffusion, MaskRow
from udiff.models.dual_diffusion.text import TextStates
from udiff.weights import load_strictly


class NoTokenizer:
    """Cases come with ids; they say which of them ends a text."""

    eos_token_id = pad_token_id = 1


def load_network(case: Case) -> DualDiffusion:
    network = network_from_official(case.config.get("model", case.config))
    load_strictly(network, case.weights, source=case.name)
    return network.eval()


def load_t5(case: Case) -> T5:
    model = T5EncoderModel(T5Config(**case.config["text_encoder"]))
    weights = _tensors(case.file, "weights.text_encoder/")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]  # one and the same
    load_strictly(model, weights, source=case.name)
    return T5(model, NoTokenizer(), pad="end").eval().requires_grad_(False)


def text_states(case: Case, *, is_learned: bool = False) -> tuple[TextStates, MaskRow, T5]:
    """Make what turns ids into states; the case's table holds the row of the mask."""
    encoder, mask_id = load_t5(case), case.config["mask_index"]
    table = encoder.model.get_input_embeddings().weight
    row = MaskRow(encoder.width, is_learned=is_learned)
    load_strictly(row, {"weight": table[mask_id].clone()}, source=case.name)
    frozen = Frozen(lambda: encoder)
    frozen.on(torch.device("cpu"))  # loaded now: what is set to learn later stays so
    return TextStates(frozen, row, mask_id=mask_id), row, encoder


def load_autoencoder(case: Case) -> KLAutoencoder:
    model = AutoencoderKL(**case.config["vae"])
    load_strictly(model, _tensors(case.file, "weights.vae/"), source=case.name)
    return KLAutoencoder(model).eval()


def gradients(network: DualDiffusion) -> dict[str, Tensor]:
    """Collect all gradients, their norm, and how many there are."""
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {
        **{f"grad/{name}": grad for name, grad in grads.items()},
        "grad_norm": torch.stack([grad.norm() for grad in grads.values()]).norm(),
        "num_params_with_grad": torch.tensor(len(grads)),
    }

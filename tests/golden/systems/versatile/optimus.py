"""Reference cases of the text autoencoder and its tokenizers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tests.golden.case import Case, Outputs
from udiff.autoencoders.optimus import (
    Optimus,
    OptimusDecoder,
    OptimusEncoder,
    OptimusSettings,
    TransformerSettings,
    filter_logits,
)
from udiff.autoencoders.optimus_checkpoint import from_official
from udiff.autoencoders.optimus_loss import KLMode, TextBound, sequence_nll
from udiff.autoencoders.optimus_text import OptimusTokenizer
from udiff.weights import load_strictly, strip_prefix


def encoder(case: Case) -> Outputs:
    sizes, given = _bert(case.config["config"]), case.inputs
    module = OptimusEncoder(sizes, case.config["latent_size"], dropout=0.1)
    load_strictly(module, strip_prefix(_weights(case), "encoder."), source=case.name)
    module.eval()
    ids = given["ids"]
    found = module.bert(input_ids=ids, attention_mask=(ids > 0).long())
    mean, logvar = module(ids)
    return {
        "mu": mean,
        "logvar": logvar,
        "sequence": found.last_hidden_state,
        "pooled": found.pooler_output,
        "pooled_nomask": module.bert(input_ids=ids).pooler_output,
    }


def decoder(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    module = OptimusDecoder(_gpt2(config["config"]), config["latent_size"], dropout=0.1)
    load_strictly(module, strip_prefix(_weights(case), "decoder."), source=case.name)
    module.eval()
    ids, z, labels = given["ids"], given["z"], given["labels"]
    cache = module.remember(z)
    logits = module.extend(ids, z, cache, first=0)
    on_labels = module(labels, z)
    found = {
        "logits": logits,
        "present0": torch.stack([cache.layers[0].keys, cache.layers[0].values]),
        "logits_memory_only": module(ids, z, with_embedding=False),
        "logits_embedding_only": module(ids, z, with_memory=False),
        "logits_no_latent": module(ids, None),
        "logits_labels": on_labels,
        "loss_per_sample": sequence_nll(on_labels, labels, pad_id=config["label_ignore"]),
    }
    optimus = Optimus.__new__(Optimus)
    torch.nn.Module.__init__(optimus)
    optimus.decoder = module
    greedy = optimus.generate(
        z,
        seeds=range(len(z)),
        top_k=1,
        temperature=config["greedy_temperature"],
        max_tokens=config["max_length"],
    )
    found |= {f"greedy_{row}": torch.tensor(text) for row, text in enumerate(greedy)}
    return found | {n: _filtered(given["filter_logits"], n) for n in case.outputs if "probs" in n}


def _filtered(logits: Tensor, name: str) -> Tensor:
    settings = {part[:4]: float(part[4:]) for part in name.split("_")[1:]}
    top_k, top_p = int(settings.get("topk", 0)), settings.get("topp", 0.0)
    return filter_logits(logits, top_k=top_k, top_p=top_p or 1.0).softmax(-1)


MODES: dict[int, KLMode] = {0: "plain", 1: "free_bits", 2: "deterministic"}


def autoencoder(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    settings = OptimusSettings(
        latent_dim=config["latent_size"],
        encoder=_bert(config["bert"]),
        decoder=_gpt2(config["gpt2"]),
    )
    optimus = Optimus(settings)
    load_strictly(optimus, _weights(case), source=case.name)
    optimus.eval()
    found: dict[str, Tensor] = {"encode_mu": optimus.encoder(given["encoder_ids"]).mean}
    for name, asked in config["losses"].items():
        losses = _losses(optimus, case, asked)
        found |= {
            f"{name}_rec": losses.reconstruction,
            f"{name}_kl": losses.kl,
            f"{name}_loss": losses.total,
        }
    _losses(optimus, case, config["losses"]["fb0"]).total.mean().backward()
    grads = {key: p.grad for key, p in optimus.named_parameters() if p.grad is not None}
    found["grad_norm"] = get_total_norm(list(grads.values())).double()
    official = {"memory": "transformer.linear", "embedding": "transformer.linear_emb"}
    for key, grad in grads.items():
        half, name, *rest = key.split(".")
        found[f"grad/{'.'.join([half, official.get(name, name), *rest])}"] = grad
    return found


def _losses(optimus: Optimus, case: Case, asked: dict[str, Any]) -> Any:
    bound = TextBound(
        beta=asked["beta"],
        mode=MODES[asked["fb_mode"]],
        free_nats=asked.get("dim_target_kl", 0.0),
        is_length_weighted=asked["length_weighted_loss"],
    )
    given = case.inputs
    return bound(optimus, given["loss_encoder_ids"], given["labels"], given["eps"].squeeze(1))


def tokens(case: Case) -> Outputs:
    """Cut and join texts; of the vocabularies, the case tells the part that its texts need."""
    header = case.header
    pieces = {
        piece: number
        for tokens, ids in zip(header["encoder_tokens"], header["encoder_ids"], strict=True)
        for piece, number in zip(["[CLS]", *tokens, "[SEP]"], ids, strict=True)
    }
    tokenizer = OptimusTokenizer({"[PAD]": 0, "[UNK]": 100} | pieces, {}, [])
    ids = tokenizer.encode(header["texts"])
    lengths = (ids > 0).sum(1)
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return {"encoder_ids_flat": torch.cat(rows), "encoder_lens": lengths}


def _weights(case: Case) -> dict[str, Tensor]:
    return from_official(strip_prefix(case.weights, "vae.text."))


def _bert(config: dict[str, Any]) -> TransformerSettings:
    return TransformerSettings(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["intermediate_size"],
        num_positions=config["max_position_embeddings"],
    )


def _gpt2(config: dict[str, Any]) -> TransformerSettings:
    return TransformerSettings(
        vocab_size=config["vocab_size"],
        dim=config["n_embd"],
        depth=config["n_layer"],
        num_heads=config["n_head"],
        hidden_dim=4 * config["n_embd"],
        num_positions=config["n_positions"],
    )

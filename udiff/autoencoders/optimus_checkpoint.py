"""Optimus's files: the official layout both ways, and loading what the family `optimus` trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn

from udiff.autoencoders.optimus import Optimus, OptimusSettings, TransformerSettings
from udiff.autoencoders.optimus_text import MAX_PIECES, OptimusTokenizer, load_optimus_tokenizer
from udiff.settings import EncoderSettings
from udiff.weights import WeightsError, hash_module, load_strictly, strip_prefix

MODULE = "optimus."
"""Prefix of the weights in a bundle."""

_DERIVED = re.compile(
    r"decoder\.lm_head\.weight|decoder\.transformer\.h\.\d+\.attn\.(masked_)?bias"
)
"""The head is the tokens' table, and masks are no weights."""
_RENAMED = (
    ("decoder.transformer.linear.", "decoder.memory."),
    ("decoder.transformer.linear_emb.", "decoder.embedding."),
    ("encoder.linear.", "encoder.linear."),
    ("encoder.", "encoder.bert."),
)


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring official weights to our keys, float32."""
    kept = {key: t.float() for key, t in weights.items() if not _DERIVED.fullmatch(key)}
    return {_renamed(key, _RENAMED): tensor for key, tensor in kept.items()}


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring our weights to the official keys, the head written out."""
    back = tuple((ours, theirs) for theirs, ours in _RENAMED)
    official = {_renamed(key, back): tensor for key, tensor in weights.items()}
    return official | {"decoder.lm_head.weight": official["decoder.transformer.wte.weight"]}


def infer_settings(official: Mapping[str, Tensor]) -> OptimusSettings:
    """Find the sizes of the network that has these official weights; heads are 64 wide.

    Raises:
        WeightsError: they are of no such network.
    """
    try:
        pieces = official["encoder.embeddings.word_embeddings.weight"]
        tokens = official["decoder.transformer.wte.weight"]
        return OptimusSettings(
            latent_dim=len(official["encoder.linear.weight"]) // 2,
            encoder=TransformerSettings(
                vocab_size=len(pieces),
                dim=pieces.shape[1],
                depth=_count(official, r"encoder\.encoder\.layer\.(\d+)\."),
                num_heads=max(1, pieces.shape[1] // 64),
                hidden_dim=len(official["encoder.encoder.layer.0.intermediate.dense.weight"]),
                num_positions=len(official["encoder.embeddings.position_embeddings.weight"]),
            ),
            decoder=TransformerSettings(
                vocab_size=len(tokens),
                dim=tokens.shape[1],
                depth=_count(official, r"decoder\.transformer\.h\.(\d+)\."),
                num_heads=max(1, tokens.shape[1] // 64),
                hidden_dim=official["decoder.transformer.h.0.mlp.c_fc.weight"].shape[1],
                num_positions=len(official["decoder.transformer.wpe.weight"]),
            ),
        )
    except KeyError as error:
        raise WeightsError(f"this is no checkpoint of Optimus: it has no {error}") from None


class TextAutoencoder(nn.Module):
    """Optimus with its tokenizers: texts -> latents -> texts."""

    def __init__(self, optimus: Optimus, tokenizer: OptimusTokenizer) -> None:
        """Take both."""
        super().__init__()
        self.optimus = optimus
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Length of a latent."""
        return self.optimus.encoder.linear.out_features // 2

    def tokenize(
        self, texts: Sequence[str], max_tokens: int
    ) -> Int64[Tensor, "texts {max_tokens}"]:
        """Cut texts into word pieces, start and end among the `max_tokens`; fills up with 0."""
        return self.tokenizer.encode(texts, max_pieces=max_tokens - 2)

    def count_tokens(self, ids: Int64[Tensor, "texts tokens"]) -> Int64[Tensor, " texts"]:
        """Count what has a state: one, the latent."""
        return torch.ones(len(ids), dtype=torch.int64)

    def encode(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts 1 latent"]:
        """Encode ids to latents, the means, as one token each."""
        return self.optimus.encoder(ids).mean[:, None]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts latent"]:
        """Encode texts to latents."""
        longest = self.optimus.encoder.bert.config.max_position_embeddings
        ids = self.tokenize(texts, min(MAX_PIECES + 2, longest))
        return self.encode(ids.to(next(self.optimus.parameters()).device))[:, 0]

    def decode(self, latent: Tensor, *, seed: int, temperature: float = 1.0, top_k: int = 0,
               top_p: float = 1.0) -> str:  # fmt: skip
        """Write the text of one latent (latent,), not normalized."""
        [ids] = self.optimus.generate(
            latent[None], seeds=[seed], temperature=temperature, top_k=top_k, top_p=top_p
        )
        return self.tokenizer.decode(ids)

    def fingerprint(self) -> str:
        """Hash what latents depend on: the encoder and its vocabulary."""
        heads = self.optimus.encoder.bert.config.num_attention_heads
        pieces = sorted(self.tokenizer.pieces.items(), key=lambda item: item[1])
        return hash_module(self.optimus.encoder, {"num_heads": heads, "pieces": pieces})


def load_text_autoencoder(settings: EncoderSettings) -> TextAutoencoder:
    """Load a bundle of family `optimus`, in evaluation mode.

    Raises:
        FileNotFoundError: there is none.
        WeightsError: it holds something else.
    """
    folder = Path(settings.path)
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(
            f"text_autoencoder.path {settings.path!r} is no bundle of family optimus; an official "
            "file becomes one by `python -m jobs.convert --family optimus`"
        )
    keys = yaml.safe_load((folder / "recipe.yaml").read_text())
    if keys.get("family") != "optimus":
        raise WeightsError(
            f"text_autoencoder.path {settings.path!r} is a bundle of family {keys.get('family')}, "
            "not of optimus"
        )
    optimus = Optimus(OptimusSettings.model_validate(keys["network"]))
    weights = strip_prefix(load_file(folder / "weights.safetensors"), MODULE)
    load_strictly(optimus, weights, source=settings.path)
    tokenizers = EncoderSettings(path=keys["tokenizers"]["path"]).relative_to(folder)
    text = TextAutoencoder(optimus, load_optimus_tokenizer(tokenizers.path))
    return text.eval().requires_grad_(False)


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in weights)
    return 1 + max(int(match.group(1)) for match in found if match)

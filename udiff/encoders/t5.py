"""T5's encoder (arXiv 1910.10683) by transformers, as SD3 and Dual Diffusion read texts with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from udiff.settings import T5Settings
from udiff.weights import WeightsError, hash_module, read_checkpoint

_FOLDERS = (("text_encoder_3", "tokenizer_3"), ("text_encoder", "tokenizer"), ("", ""))
"""Where SD3's pipelines, those of Dual Diffusion, and bare models keep encoder and tokenizer."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "stored": "auto"}


class T5(nn.Module):
    """Texts -> states of their tokens, without an attention mask: padding is looked at too."""

    def __init__(self, model: Any, tokenizer: Any, *, pad: Literal["end", "pad"] = "pad") -> None:
        """Wrap transformers' `T5EncoderModel` and a tokenizer, neither of which has types."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.end_id if pad == "end" else tokenizer.pad_token_id

    @property
    def width(self) -> int:
        """Length of a token's state."""
        return self.model.config.d_model

    @property
    def num_tokens(self) -> int:
        """Number of tokens that texts are made of; the model's table may have more rows."""
        return len(self.tokenizer)

    def tokenize(
        self, texts: Sequence[str], max_tokens: int
    ) -> Int64[Tensor, "texts {max_tokens}"]:
        """Cut texts into tokens and an end token, at most `max_tokens`; pads short ones."""
        ids = torch.full((len(texts), max_tokens), self.pad_id)
        for row, text in zip(ids, texts, strict=True):
            # Cut here: told to cut, the tokenizer changes its own state, which threads must not.
            found = [*self.tokenize_bare(text)[: max_tokens - 1], self.end_id]
            row[: len(found)] = torch.tensor(found)
        return ids

    def count_tokens(self, ids: Int64[Tensor, "texts tokens"]) -> Int64[Tensor, " texts"]:
        """Count each text's tokens up to its first end token, and that one."""
        is_end = ids == self.end_id
        first = is_end.int().argmax(1) + 1
        return torch.where(is_end.any(1), first, ids.shape[1])

    def tokenize_bare(self, text: str) -> list[int]:
        """Cut a text into tokens, as many as it has, without an end token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Int64[Tensor, " tokens"]) -> str:
        """Turn ids up to the first end token into text."""
        length = int(self.count_tokens(ids[None])[0])
        return self.tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True)

    def forward(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts tokens width"]:
        """Find the states of tokens."""
        return self.encode_embedded(self.embed(ids))

    encode = forward

    def embed(self, ids: Int64[Tensor, "texts tokens"]) -> Float[Tensor, "texts tokens width"]:
        """Look the tokens' rows up in the model's table."""
        return self.model.get_input_embeddings()(ids)

    def encode_embedded(
        self, embedded: Float[Tensor, "texts tokens width"]
    ) -> Float[Tensor, "texts tokens width"]:
        """Find the states of tokens that have been looked up, or put in place of a row."""
        dtype = self.model.get_input_embeddings().weight.dtype
        return self.model(inputs_embeds=embedded.to(dtype)).last_hidden_state.float()

    def fingerprint(self) -> str:
        """Hash what the states depend on: tokens, padding, configuration and weights."""
        config = self.model.config
        about = {name: getattr(config, name) for name in _IDENTITY_KEYS}
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hash_module(self.model, {**about, "pad": self.pad_id, "tokens": vocabulary})


_IDENTITY_KEYS = (
    "d_kv", "num_heads", "feed_forward_proj", "relative_attention_num_buckets",
    "relative_attention_max_distance", "layer_norm_epsilon",
)  # fmt: skip


def load_t5(settings: T5Settings) -> T5:
    """Load an encoder and its tokenizer, in evaluation mode.

    Raises:
        FileNotFoundError: there is none at the path, and none on the hub that can be reached.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    name, folders = _locate(settings.path)
    try:
        model = T5EncoderModel.from_pretrained(
            name,
            subfolder=folders[0],
            dtype=_DTYPES[settings.precision],
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=folders[1])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"text_encoder.path {settings.path!r} is neither a local folder with a T5 encoder "
            "(config.json, safetensors weights) and its tokenizer, nor one of the hub that can be "
            f"reached: {error}"
        ) from error
    return T5(model, tokenizer, pad=settings.pad).eval().requires_grad_(False)


def read_token_row(path: str | Path) -> Float[Tensor, " width"]:
    """Read one row of a token table from a file that holds it alone (`mask_token_emb...pth`).

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it holds something else.
    """
    found: Any = read_checkpoint(path)
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].squeeze().ndim != 1:
        raise WeightsError(f"{path} does not hold one row of a token table and nothing else")
    return tensors[0].squeeze().float()


def _locate(path: str) -> tuple[str, tuple[str, str]]:
    """Split a path into what transformers loads from, and the folders of model and tokenizer."""
    if Path(path).exists():
        present = (f for f in _FOLDERS if (Path(path) / f[0] / "config.json").is_file())
        return path, next(present, ("", ""))
    parts = path.split("/")
    folder = "/".join(parts[2:])
    return "/".join(parts[:2]), (folder, folder.replace("text_encoder", "tokenizer"))

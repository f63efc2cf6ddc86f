"""Optimus (arXiv 2004.04092): a text's latent vector by BERT, and its text again by GPT-2.

Both are transformers' models but for three things: the latent is an extra position at the front of
every decoder layer (its key and its value both), it is added to every token's embedding, and
positions are counted from 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from udiff.settings import Settings


class TransformerSettings(Settings):
    """Sizes of one half."""

    vocab_size: int
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    num_positions: int


class OptimusSettings(Settings):
    """Sizes of both halves; the defaults are the published ones."""

    latent_dim: int = 768
    encoder: TransformerSettings = TransformerSettings(vocab_size=28_996, num_positions=512)
    decoder: TransformerSettings = TransformerSettings(vocab_size=50_260, num_positions=1024)
    """The last three of its tokens are the filler, the start and the end."""
    dropout: float = 0.0
    """Drawn outside of a step's draws: a resumed run with dropout is another one."""


class TextMoments(NamedTuple):
    """Diagonal normal distribution of latents."""

    mean: Float[Tensor, "texts latent"]
    logvar: Float[Tensor, "texts latent"]


class OptimusEncoder(nn.Module):
    """Token ids (0 fills up) -> distribution of the latent."""

    def __init__(self, sizes: TransformerSettings, latent_dim: int, dropout: float) -> None:
        """Initialize as BERT is."""
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.dim,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.hidden_dim,
            max_position_embeddings=sizes.num_positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.bert = BertModel(config)
        self.linear = nn.Linear(sizes.dim, 2 * latent_dim, bias=False)

    def forward(self, ids: Int64[Tensor, "texts tokens"]) -> TextMoments:
        """Encode; only real tokens are looked at."""
        _check_length(ids.shape[1], self.bert.config.max_position_embeddings, "encoder")
        pooled = self.bert(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output
        return TextMoments(*self.linear(pooled).chunk(2, dim=-1))


class OptimusDecoder(nn.Module):
    """Latent and the tokens so far -> logits of the next token."""

    def __init__(self, sizes: TransformerSettings, latent_dim: int, dropout: float) -> None:
        """Initialize as GPT-2 is; the head is the table of tokens itself."""
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        config = GPT2Config(
            vocab_size=sizes.vocab_size,
            n_embd=sizes.dim,
            n_layer=sizes.depth,
            n_head=sizes.num_heads,
            n_inner=sizes.hidden_dim,
            n_positions=sizes.num_positions,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.transformer = GPT2Model(config)
        self.memory = nn.Linear(latent_dim, sizes.depth * sizes.dim, bias=False)
        self.embedding = nn.Linear(latent_dim, sizes.dim, bias=False)

    @property
    def pad_id(self) -> int:
        """Token that fills texts up; the start and the end are the next two."""
        return self.transformer.config.vocab_size - 3

    def forward(
        self,
        ids: Int64[Tensor, "texts tokens"],
        latent: Float[Tensor, "texts latent"] | None,
        *,
        with_memory: bool = True,
        with_embedding: bool = True,
    ) -> Float[Tensor, "texts tokens vocabulary"]:
        """Compute the logits after every token.

        Args:
            ids: start token and what follows it.
            latent: of the text; without one it is a language model.
            with_memory: give the layers the latent.
            with_embedding: add the latent to the tokens' embeddings.
        """
        memory = self.remember(latent) if with_memory and latent is not None else None
        return self.extend(ids, latent if with_embedding else None, memory, first=0)

    def remember(self, latent: Float[Tensor, "texts latent"]) -> Any:
        """Make the cache of keys and values that a text begins with."""
        from transformers import DynamicCache

        config = self.transformer.config
        slices = self.memory(latent).view(len(latent), config.n_layer, config.n_head, 1, -1)
        cache = DynamicCache()
        for layer, part in enumerate(slices.unbind(1)):
            cache.update(part, part, layer)
        return cache

    def extend(
        self,
        ids: Int64[Tensor, "texts tokens"],
        latent: Float[Tensor, "texts latent"] | None,
        cache: Any,
        *,
        first: int,
    ) -> Float[Tensor, "texts tokens vocabulary"]:
        """Compute the logits after further tokens; those before are in the cache.

        Args:
            ids: the further tokens.
            latent: to be added to their embeddings, or none.
            cache: of `remember`, with what earlier calls added; or none.
            first: number of tokens before.

        Raises:
            ValueError: there are too few positions; the latent takes the first in the cache.
        """
        embedded = self.transformer.wte(ids)
        if latent is not None:
            embedded = embedded + self.embedding(latent)[:, None]
        has_memory = cache is not None
        positions = torch.arange(first, first + ids.shape[1], device=ids.device) + has_memory
        length = first + ids.shape[1] + has_memory
        _check_length(length, self.transformer.config.n_positions, "decoder")
        hidden = self.transformer(
            inputs_embeds=embedded,
            position_ids=positions[None],
            past_key_values=cache,
            attention_mask=torch.ones(len(ids), length, dtype=torch.long, device=ids.device),
            use_cache=has_memory,
        ).last_hidden_state
        return hidden @ self.transformer.wte.weight.T


class Optimus(nn.Module):
    """Text autoencoder on token ids; `OptimusTokenizer` makes them of texts."""

    def __init__(self, settings: OptimusSettings) -> None:
        """Initialize both halves."""
        super().__init__()
        sizes = settings.latent_dim, settings.dropout
        self.encoder = OptimusEncoder(settings.encoder, *sizes)
        self.decoder = OptimusDecoder(settings.decoder, *sizes)

    def forward(
        self,
        ids: Int64[Tensor, "texts encoder_tokens"],
        labels: Int64[Tensor, "texts decoder_tokens"],
        noise: Float[Tensor, "texts latent"],
        *,
        is_deterministic: bool = False,
    ) -> tuple[TextMoments, Float[Tensor, "texts decoder_tokens vocabulary"]]:
        """Encode, sample with the given noise, decode (training goes through here)."""
        moments = self.encoder(ids)
        if is_deterministic:
            moments = TextMoments(moments.mean, torch.zeros_like(moments.logvar))
        latent = moments.mean + (0.5 * moments.logvar).exp() * noise
        return moments, self.decoder(labels, latent)

    @torch.no_grad()
    def generate(
        self,
        latent: Float[Tensor, "texts latent"],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_tokens: int = 30,
    ) -> list[list[int]]:
        """Write a text for each latent, token by token; start and end tokens included.

        Args:
            latent: not normalized.
            seeds: one for each text, which does not depend on its neighbors.
            temperature: above 1 makes rare tokens likelier.
            top_k: draw from so many of the likeliest tokens; 0 from all.
            top_p: draw from the likeliest tokens that have this probability together.
            max_tokens: length at which a text is cut; its last token is made an end.
        """
        decoder = self.decoder
        start, end = decoder.pad_id + 1, decoder.pad_id + 2
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        texts = [[start] for _ in seeds]
        cache = decoder.remember(latent)
        for length in range(1, max_tokens):
            last = torch.tensor([text[-1:] for text in texts], device=latent.device)
            logits = decoder.extend(last, latent, cache, first=length - 1)[:, -1].float().cpu()
            for row, text in enumerate(texts):
                if text[-1] != end:
                    kept = filter_logits(logits[row] / temperature, top_k=top_k, top_p=top_p)
                    drawn = torch.multinomial(kept.softmax(-1), 1, generator=generators[row])
                    text.append(int(drawn))
                else:
                    text.append(end)  # goes along until all have ended
            if all(text[-1] == end for text in texts):
                break
        return [_ended(text, end) for text in texts]


def filter_logits(
    logits: Float[Tensor, " vocabulary"], *, top_k: int, top_p: float
) -> Float[Tensor, " vocabulary"]:
    """Remove unlikely tokens: first all but `top_k`, then those behind the first `top_p`.

    The token with which the sum of probabilities passes `top_p` stays.
    """
    if top_k:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    order = logits.argsort(descending=True)
    before = logits[order].softmax(-1).cumsum(-1).roll(1)
    before[0] = 0
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before > top_p)
    return logits.masked_fill(removed, -torch.inf)


def _ended(text: list[int], end: int) -> list[int]:
    if end in text:
        return text[: text.index(end) + 1]
    return [*text[:-1], end]


def _check_length(length: int, num_positions: int, half: str) -> None:
    if length > num_positions:
        raise ValueError(
            f"network.{half}.num_positions is {num_positions}, but {length} positions are needed "
            "(the decoder needs one more than tokens, for the latent)"
        )

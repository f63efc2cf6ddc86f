"""Tiny captioners, written by transformers; one is taught to name a few colors."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLORS = ("red", "lime", "blue", "white")
_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:", "what", "color", "is"]
_WORDS += ["it", "a", "picture", *COLORS]
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_captioner(folder: Path, *, steps: int = 80) -> str:
    """Save a model that says `a <color> picture`; returns its folder."""
    torch.manual_seed(0)
    processor = _processor()
    model = LlavaForConditionalGeneration(_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = _batch(processor)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _processor() -> LlavaProcessor:
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(_WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["extra_special_tokens"] = {"image_token": "<image>"}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def _config() -> LlavaConfig:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=16)
    text = LlamaConfig(
        **small,
        num_hidden_layers=2,
        vocab_size=len(_WORDS),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_WORDS.index("<image>")
    )


def _batch(processor: LlavaProcessor) -> dict:
    pictures = [Image.new("RGB", (32, 32), color) for color in COLORS]
    texts = [
        f"user: <image> what color is it assistant: a {color} picture </s>" for color in COLORS
    ]
    batch = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    start = (labels[0] == _WORDS.index("assistant:")).nonzero().item()
    labels[:, : start + 1] = -100
    return {**batch, "labels": labels}


def save_blip(folder: Path) -> str:
    """Save an untrained model of a kind that does not chat; returns its folder."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "a", "picture", "of", *COLORS]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {**small, "num_hidden_layers": 1, "vocab_size": len(words), "encoder_hidden_size": 32}
    ends = {"bos_token_id": 4, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**small, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config={**text, **ends}, vision_config=vision)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)

"""Make what a debug run of texts and pictures needs and nobody can download: small encoders.

    python -m jobs.small_encoders --pictures runs/versatile/pictures --out runs/versatile

Writes `tokenizers/` (vocabularies of Optimus, learned from the captions of a pictures cache) and
`clip/` (a CLIP of random weights with the real byte pairs: a fixed code of texts and pictures).
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

from jobs.console import make_parser, run_job
from udiff.data.manifest import read_manifest
from udiff.data.storage import open_folder

NUM_TOKENS = 600
CLIP_WIDTH = 64


def make_small_encoders(pictures: str, out: Path) -> None:
    """Write both; equal captions give equal bytes.

    Raises:
        FileNotFoundError: there is no finished cache of pictures.
    """
    from udiff.autoencoders.optimus_text import train_optimus_tokenizer

    tokenizer = train_optimus_tokenizer(read_captions(pictures), num_tokens=NUM_TOKENS)
    tokenizer.save(out / "tokenizers")
    _save_clip(out / "clip")


def read_captions(pictures: str) -> list[str]:
    """Read all captions of a cache."""
    folder = open_folder(pictures)
    captions: list[str] = []
    for file in read_manifest(folder).files:
        with folder.open(file.path) as parquet:
            captions += pq.read_table(parquet, columns=["caption"])["caption"].to_pylist()
    return captions


def _save_clip(path: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel

    from udiff.encoders.clip import openai_tokenizer

    torch.manual_seed(0)
    sizes = {
        "hidden_size": CLIP_WIDTH, "intermediate_size": 2 * CLIP_WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "projection_dim": CLIP_WIDTH,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 49_408, "max_position_embeddings": 24},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=CLIP_WIDTH,
    )
    CLIPModel(config).save_pretrained(path)
    openai_tokenizer().save_pretrained(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("jobs.small_encoders", __doc__)
    parser.add_argument("--pictures", required=True, help="cache of pictures with captions")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    options = parser.parse_args(arguments)

    def job() -> None:
        make_small_encoders(options.pictures, options.out)
        print(f"wrote {options.out / 'tokenizers'} and {options.out / 'clip'}")

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())

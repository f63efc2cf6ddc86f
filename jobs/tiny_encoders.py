"""Make the tiny frozen encoders of debug recipes: a random T5 with the real tokenizer, a VAE.

    python -m jobs.tiny_encoders --t5 runs/dual_diffusion/t5
    python -m jobs.tiny_encoders --autoencoder runs/vae/bundle --vae runs/dual_diffusion/vae

The T5 encoder is random, which tells tokens and their order apart well enough to learn from; its
tokenizer (T5's, 32,100 tokens) comes from the package InvokeAI. The VAE is a bundle of the family
`kl_autoencoder`, written as a folder of diffusers.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from jobs.console import UserError, make_parser, run_job
from jobs.fetch_testdata import fetch_files
from udiff.bundle import load_autoencoder

TOKENIZER = "InvokeAI==6.14.2"
TOKENIZER_FOLDER = "invokeai/backend/t5/tokenizer"
NUM_ROWS = 32_128
"""Of T5's token table."""


def write_t5(out: Path, *, width: int = 32, depth: int = 2, seed: int = 0) -> None:
    """Write a random T5 encoder and its tokenizer into one folder.

    Raises:
        RuntimeError: the tokenizer can't be fetched.
    """
    tokenizer = AutoTokenizer.from_pretrained(fetch_files(TOKENIZER, part=TOKENIZER_FOLDER))
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=NUM_ROWS,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=depth,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    T5EncoderModel(config).save_pretrained(out)


def write_vae(bundle: str, out: Path) -> None:
    """Write a bundle's autoencoder as a folder of diffusers.

    Raises:
        UserError: it is not diffusers' autoencoder.
    """
    model = load_autoencoder(bundle).model
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"--autoencoder {bundle} is not one that diffusers has a class for")
    model.save_pretrained(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("jobs.tiny_encoders", __doc__)
    parser.add_argument("--t5", type=Path, help="folder of the T5 to write")
    parser.add_argument("--width", type=int, default=32, help="of the T5's states")
    parser.add_argument("--autoencoder", help="bundle of a kl_autoencoder")
    parser.add_argument("--vae", type=Path, help="folder of the VAE to write")
    options = parser.parse_args(arguments)
    return run_job(lambda: _run(options), failures=(RuntimeError,))


def _run(options: argparse.Namespace) -> None:
    if options.t5:
        write_t5(options.t5, width=options.width)
        print(f"wrote {options.t5}")
    if options.autoencoder and options.vae:
        write_vae(options.autoencoder, options.vae)
        print(f"wrote {options.vae}")


if __name__ == "__main__":
    sys.exit(main())

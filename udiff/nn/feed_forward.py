"""Feed-forward layers."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        # In the order of official optimizer states, which know parameters by their numbers.
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token by itself."""
        return self.w2(silu(self.w1(x)) * self.w3(x))

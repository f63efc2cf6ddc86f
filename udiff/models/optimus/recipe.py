"""What a recipe of Optimus can say, and the system that it makes."""

from functools import partial
from typing import Literal

from pydantic import Field

from udiff.autoencoders.optimus import Optimus, OptimusSettings
from udiff.autoencoders.optimus_checkpoint import MODULE
from udiff.autoencoders.optimus_loss import KLMode, TextBound
from udiff.models.optimus.objective import LABELS, PIECES, TextObjective
from udiff.settings import EncoderSettings, OptimizerSettings, Settings
from udiff.system import FamilyRecipe, Phase, System

_NAME = MODULE.removesuffix(".")


class ObjectiveSettings(Settings):
    """The bound's divergence, and how it is kept from vanishing."""

    beta: float = Field(default=1.0, ge=0)
    """Weight of the divergence."""
    mode: KLMode = "free_bits"
    free_nats: float = Field(default=0.5, ge=0)
    """Divergence of a dimension up to which it costs nothing, with free bits."""
    is_length_weighted: bool = False
    """Divide the reconstruction by the number of tokens."""


class Recipe(FamilyRecipe):
    """A run of Optimus."""

    family: Literal["optimus"]
    network: OptimusSettings = OptimusSettings()
    tokenizers: EncoderSettings
    """Folder with BERT's `vocab.txt`, GPT-2's `vocab.json` and `merges.txt`."""
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings

    def build(self) -> System:
        """Make both halves and the objective."""
        optimus = Optimus(self.network)
        settings = self.objective
        bound = TextBound(
            settings.beta, settings.mode, settings.free_nats, settings.is_length_weighted
        )
        objective = TextObjective(bound, self.network.latent_dim)
        phase = Phase(
            _NAME,
            modules=(_NAME,),
            draw=objective.draw,
            loss=partial(objective, optimus),
            optimizer=self.optimizer,
        )
        return System(
            modules={_NAME: optimus},
            phases=(phase,),
            columns=(PIECES, LABELS),
            ema_modules=(_NAME,),
        )

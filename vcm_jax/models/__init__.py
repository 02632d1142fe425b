"""The network, and what it computes on given variables."""

from vcm_jax.models.config import MODELS as MODELS
from vcm_jax.models.config import ModelConfig as ModelConfig
from vcm_jax.models.mmdit import Conditions as Conditions
from vcm_jax.models.mmdit import EncodedConditions as EncodedConditions
from vcm_jax.models.mmdit import MMDiT as MMDiT

"""The room of costs. `CostModel` is its door: seconds and bytes of a group, from a JSON file. Nothing imports torch."""

from hf_hetero.costs.activation_policy import ActivationPolicy
from hf_hetero.costs.cost_model import CostModel
from hf_hetero.costs.crossings import Charges
from hf_hetero.costs.files import SHIPPED_FOLDER, shipped_names

__all__ = ["SHIPPED_FOLDER", "ActivationPolicy", "Charges", "CostModel", "shipped_names"]

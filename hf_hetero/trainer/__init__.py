"""The overridden methods of `Trainer`, and the run that they hold: fitted model, groups, planners, planned steps."""

from hf_hetero.trainer.trainer import HeteroTrainer, HeteroTrainerMixin

__all__ = ["HeteroTrainer", "HeteroTrainerMixin"]

"""This folder overrides methods of `Trainer`, and has the run that they hold: fitted model, groups, planners, steps."""

from hf_hetero.trainer.trainer import HeteroTrainer, HeteroTrainerMixin

__all__ = ["HeteroTrainer", "HeteroTrainerMixin"]

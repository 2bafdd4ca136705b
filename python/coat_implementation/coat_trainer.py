"""The trainer's names, under the module path that guides show."""

from . import COATConfig, COATTrainer, create_coat_trainer_for_flux_lora

__all__ = ["COATConfig", "COATTrainer", "create_coat_trainer_for_flux_lora"]

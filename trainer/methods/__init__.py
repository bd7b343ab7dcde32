"""What pretraining learns from: one file a method, listed here and nowhere else."""

from trainer.methods.pcrl import Pcrl

METHODS = {"pcrl": Pcrl}
"""By the `name` of the recipe's method."""

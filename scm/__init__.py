"""How one model that may answer bottom learns: targets, losses, policies, trainer, strict inference."""

__version__ = "0.1.0"

"""Guards of a training's stability, each usable alone on any PyTorch training."""

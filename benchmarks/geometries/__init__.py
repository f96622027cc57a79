"""The geometries that are measured: those of torchvision models, and drawn ones of timm."""

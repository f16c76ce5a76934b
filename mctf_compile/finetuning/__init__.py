"""Training a model with fused tokens from a folder of images, so that it can be stopped and goes on."""

"""Compile a Vision Transformer with token fusion, see what was fused, and run it."""

import timm
import torch

import mctf_compile

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224").eval()  # pretrained=True for real weights
images = torch.randn(2, 3, 224, 224)

# What the backend will do; nothing is compiled yet.
print(mctf_compile.explain(model, images, r=16))

# The backend is found by its name alone. inner="inductor", the default, is the fast one; eager is the quick start.
fast = torch.compile(model, backend="mctf", options={"r": 16, "inner": "eager"})
with torch.no_grad():
    print(f"dense {tuple(model(images).shape)}, fused {tuple(fast(images).shape)}")

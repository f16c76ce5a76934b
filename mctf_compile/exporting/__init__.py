"""Fused models as files: ``torch.export``, ONNX, OpenVINO and AOTInductor."""

"""Exported models: writing them as ONNX, torch.export or AOTInductor files, and running these."""

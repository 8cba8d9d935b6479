"""Kubernetes operator that downloads LoRA adapters once, verifies them and serves them from vLLM pods."""

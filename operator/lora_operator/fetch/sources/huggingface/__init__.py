"""The Hugging Face Hub. Nothing is imported here: `environment.prepare` comes before huggingface_hub."""

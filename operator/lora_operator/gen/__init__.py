"""Developer tools: what is generated from the models. Not part of the image."""

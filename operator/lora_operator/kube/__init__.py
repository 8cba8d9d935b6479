"""The Kubernetes API: its client, the kinds of objects, and typed views of them."""

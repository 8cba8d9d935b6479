"""End-to-end tests and the tooling they need: a real one-node Kubernetes, fixtures, the demo."""

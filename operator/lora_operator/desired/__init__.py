"""Pure builders of the manifests that the operator applies. No I/O and no decisions: what to build is decided in plan/."""

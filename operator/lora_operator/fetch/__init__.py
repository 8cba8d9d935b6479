"""The download Job's program: authorise, download into the cache, verify, check, publish.

It runs in its own pod with a tenant's credentials and writes only to the cache and to a temporary directory. It imports nothing of
the operator but `engine_kit.checks`, `errors`, `constants` and `manifest`, and it never talks to the Kubernetes API.
"""

"""The programs of Jobs. `download`: authorise, download into the cache, verify, check, publish. `evict`: remove what nobody needs.

Below them lie three wings: `sources` (where content comes from), `content` (what is judged of it) and `volume` (where it goes), each of
which may use those behind it and none before it.

A program runs in its own pod, a download with a tenant's credentials, and writes only to the cache and to a temporary directory. It
imports nothing of the operator but `engine_plugin.checks`, `errors`, `constants` and `wire`, and it never talks to the Kubernetes API.
"""

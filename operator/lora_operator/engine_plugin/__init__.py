"""The engine plugin: files that the operator mounts into the engine's container, as the package `lora_operator_plugin`.

Everything here runs beside vLLM in somebody else's image: standard library only, relative imports only, and of vLLM only
`vllm.lora.request`, `vllm.lora.resolver` and public routes (see vllm_adapter.py for the one exception). Nothing here may import the
operator, and no failure here may stop an engine from starting. The files' names and contents make the hash that the plugin is named by.

__main__        what `python3 <the mount>` runs; it lies beside the package there
launcher        the container's entry point: chooses the static adapters and becomes the engine (with ignored_env)
plugin          the ASGI middleware: start-up, resolver and HTTP API, behind admin_guard and clients
reconciler      keeps the engine equal to the list (with list_source, loader, loads, served_adapters, history): its docstring has a diagram
vllm_adapter    alone knows vLLM (with asgi)
list_file, plugin_settings, state_files     what comes from the operator, and what is kept in the pod
checks          what vLLM would refuse or serve wrongly (with the modules below it); the fetcher imports it too
"""

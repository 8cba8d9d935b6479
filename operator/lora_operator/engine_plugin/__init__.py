"""The engine kit: files that the operator mounts into the engine's container, as the package `lora_operator_plugin`.

Everything here runs beside vLLM in somebody else's image: standard library only, relative imports only, and of vLLM only
`vllm.lora.request`, `vllm.lora.resolver` and public routes (see engine.py for the one exception). Nothing here may import the
operator, and no failure here may stop an engine from starting.

checks     what vLLM would refuse or serve wrongly (with tensors, basemodel, peftconfig, problems, text); the fetcher imports it too
launcher   the container's entry point: chooses the static adapters and becomes the engine
__main__   what `python3 <the mount>` runs; it lies beside the package there (with environment: variables that no engine gets)
kit        the ASGI middleware: start-up, gate, resolver, HTTP API (with gate, keeper, ledger, inbox, engine, modules)
"""

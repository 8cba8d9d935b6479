# The operator, and the program of its download Jobs. BASE_IMAGE is any image with python3 >= 3.11 and its venv module.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
COPY requirements/build.txt requirements/operator.txt /src/requirements/
# The secrets are this machine's way to a package index; they may be absent.
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && python3 -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r /src/requirements/build.txt \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --require-hashes -r /src/requirements/operator.txt

FROM build AS package
COPY pyproject.toml README.md LICENSE /src/
COPY operator /src/operator
RUN /opt/build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /src/dist /src \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --no-index --no-deps --target /opt/app /src/dist/*.whl \
    && PYTHONPATH=/opt/app /opt/app/bin/lora-operator --help >/dev/null

# Dependencies and our own package are layers of their own: a change of our code moves a few kilobytes.
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="lora-operator" \
      org.opencontainers.image.description="Downloads LoRA adapters once, verifies them and serves them from vLLM pods" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["lora-operator"]
COPY --from=build /opt/venv /opt/venv
COPY --from=package /opt/app /opt/app

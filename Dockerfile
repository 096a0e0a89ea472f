# fedsp with what a live federation needs, for CPUs or, with CUDA, for NVIDIA's GPUs:
#
#   docker build -t fedsp:cpu .
#   docker build -t fedsp:cuda --build-arg TORCH=cuda .
#
# Versions are those of constraints.txt. `scripts/check_dockerfile.py` carries these steps out without a container engine.
FROM python:3.11-slim AS build
ARG TORCH=cpu
ENV PATH=/opt/fedsp/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/fedsp
COPY constraints.txt ./
# The registry's own torch brings CUDA's libraries, several GB; PyTorch's index has a build without them.
RUN case "$TORCH" in \
      cpu) pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" ;; \
      cuda) ;; \
      *) echo "the build argument TORCH must be cpu or cuda, got $TORCH" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY src src
RUN pip install -c constraints.txt ".[flower,privacy]" \
    && pip uninstall --yes pip

FROM python:3.11-slim
LABEL org.opencontainers.image.title="fedsp" \
      org.opencontainers.image.description="Federated learning in which only tunable soft prompts travel" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"
# The cache is for whatever user a container runs as.
RUN useradd --uid 1000 --user-group --no-create-home fedsp \
    && install --directory --mode=1777 /cache
COPY --from=build /opt/fedsp /opt/fedsp
ENV PATH=/opt/fedsp/bin:$PATH HOME=/tmp HF_HOME=/cache/huggingface FEDSP_CACHE=/cache/fedsp
WORKDIR /tmp
USER 1000:1000
# Whether the program is there at all; compose.yaml and deploy/kubernetes ask a server's port.
HEALTHCHECK --interval=5m --timeout=30s --start-period=1m CMD ["fedsp", "--version"]
ENTRYPOINT ["fedsp"]
CMD ["--help"]

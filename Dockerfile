# The images of docker-compose.yml: a target for each service.
#   docker build --target producer -t keepwarm-producer .         # or collector, gpu-worker
#   docker build --target engine --build-arg ENGINE=cpu -t keepwarm-engine-cpu .   # or cuda
# In the top directory of a checkout. docs/decisions/0022-containers.md gives the reasons.

ARG ENGINE=cpu

FROM debian:bookworm-20260918-slim@sha256:3783cc01769c7b2b1b83a5c5ad96c815348e28ed7da68e2e3687004faa906251 AS base
COPY setup/image.sh /opt/keepwarm/setup/image.sh
RUN sh /opt/keepwarm/setup/image.sh packages ca-certificates python3 tini

# A virtual environment for each service: the packages of the lock file and Keepwarm, then without those
# that the service does not need.
FROM base AS locks
RUN sh /opt/keepwarm/setup/image.sh packages python3-venv
COPY setup/requirements /opt/keepwarm/setup/requirements
RUN sh /opt/keepwarm/setup/image.sh locks services.lock

FROM locks AS sources
COPY setup/unneeded.py /opt/keepwarm/setup/unneeded.py
COPY pyproject.toml README.md keepwarm_start.py /opt/keepwarm/
COPY services /opt/keepwarm/services

FROM sources AS producer-builder
RUN sh /opt/keepwarm/setup/image.sh keepwarm producer

FROM sources AS collector-builder
RUN sh /opt/keepwarm/setup/image.sh keepwarm collector

FROM sources AS gpu-worker-builder
RUN sh /opt/keepwarm/setup/image.sh keepwarm gpu-worker

# What all images have.
FROM base AS service
COPY setup/health.py setup/sbom.py /opt/keepwarm/setup/
# HF_ and PYTHON variables have to be equal in all images: those of a worker are part of its engine's plan.
ENV HF_HOME=/var/cache/huggingface \
    HOME=/tmp \
    KEEPWARM_LOG_FORMAT=json \
    KEEPWARM_METRICS_ADDRESS=0.0.0.0:9464 \
    LANG=C.UTF-8 \
    LOGNAME=keepwarm \
    PATH=/opt/keepwarm/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONNOUSERSITE=1
EXPOSE 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-I", "/opt/keepwarm/setup/health.py"]
# tini reaps orphaned processes and forwards signals.
ENTRYPOINT ["tini", "--", "keepwarm"]

# Files -> claims -> batches -> broker. Ends when all claims are sent.
FROM service AS producer
COPY --from=producer-builder /opt/keepwarm/venv /opt/keepwarm/venv
RUN sh /opt/keepwarm/setup/image.sh sbom
RUN sh /opt/keepwarm/setup/image.sh places /results /var/cache/huggingface
USER 10001:10001
WORKDIR /results
CMD ["submit", "--help"]

# Verdicts -> store -> report; also the verbs that read the store or prepare a broker.
FROM service AS collector
COPY --from=collector-builder /opt/keepwarm/venv /opt/keepwarm/venv
RUN sh /opt/keepwarm/setup/image.sh sbom
RUN sh /opt/keepwarm/setup/image.sh places /results /var/lib/keepwarm
ENV KEEPWARM_STORE_URL=/var/lib/keepwarm/keepwarm.sqlite
USER 10001:10001
WORKDIR /results
CMD ["collect"]

# What a worker and the keeper of its node have.
FROM service AS node
RUN sh /opt/keepwarm/setup/image.sh places /run/keepwarm /var/cache/keepwarm /var/cache/huggingface
ENV KEEPWARM_CACHE_DIR=/var/cache/keepwarm/node \
    KEEPWARM_RUNTIME_DIR=/run/keepwarm/node
WORKDIR /tmp

# Claims -> verdicts, with an engine behind a unix socket: without vLLM, torch and GPU.
FROM node AS gpu-worker
COPY --from=gpu-worker-builder /opt/keepwarm/venv /opt/keepwarm/venv
RUN sh /opt/keepwarm/setup/image.sh sbom
ENV KEEPWARM_START_KEEPER=false
USER 10001:10001
CMD ["worker"]

# The engine is last: Docker's classic builder builds every stage above a target.
FROM locks AS engine-builder
ARG ENGINE
# PyPI has torch only with CUDA. With an index of PyTorch's builds for processors the image is several
# GB smaller.
ARG TORCH_INDEX=
RUN TORCH_INDEX="$TORCH_INDEX" sh /opt/keepwarm/setup/image.sh locks "engine-$ENGINE.lock"
COPY setup/unneeded.py /opt/keepwarm/setup/unneeded.py
COPY pyproject.toml README.md keepwarm_start.py /opt/keepwarm/
COPY services /opt/keepwarm/services
RUN sh /opt/keepwarm/setup/image.sh keepwarm gpu-worker

# The keeper of a node with vLLM: keeps engines warm while workers start and stop.
FROM node AS engine
ARG ENGINE
# The engine for CUDA needs a C compiler: Triton builds its launchers whenever a model is loaded. The
# engine for processors compiles nothing.
RUN case $ENGINE in \
        cpu) sh /opt/keepwarm/setup/image.sh packages libnuma1 ;; \
        cuda) sh /opt/keepwarm/setup/image.sh packages gcc libc6-dev python3-dev ;; \
        *) echo "ENGINE is cpu or cuda" >&2; exit 2 ;; \
    esac
COPY --from=engine-builder /opt/keepwarm/venv /opt/keepwarm/venv
RUN sh /opt/keepwarm/setup/image.sh sbom
USER 10001:10001
CMD ["keeper"]
